"""The tasks of a training step in the order in which an engine starts them, for `schedule.run`.

One communicator sends in the order in which collectives are started, as NCCL's does. Gradients travel as soon as a
bucket of them is complete; FSDP2 and ZeRO 3 gather blocks ahead of their use. What of the objective and of the update
travels is waited for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from neuclip_scale.config import Recipe
from neuclip_scale.planning.links import link_time
from neuclip_scale.planning.schedule import Task
from neuclip_scale.planning.sharding import BF16, FP32, sharding_of
from neuclip_scale.planning.site import Site
from neuclip_scale.planning.traffic import DDP_BUCKET, Transfer
from neuclip_scale.planning.units import Unit, encoder_units

FORWARD, BACKWARD = "parameters, forward", "parameters, backward"
GRADIENTS = ("gradients", "gradients, replicas")
AFTER_BACKWARD = (
    "gradient norms",
    "norms",
    "temperature",
    "parameters, updated",
    "parameters, small",
    "the step's numbers",
    "stream marks",
)
"""Collectives that come after the backward pass; of the others that are waited for, all come before."""


@dataclass(frozen=True)
class Work:
    """What a rank computes in a step, in seconds."""

    forward: float
    """Of a micro-batch."""
    backward: float
    """Of a micro-batch, with what checkpointing computes again."""
    objective: float
    update: float
    num_micro: int
    """Micro-batches; above 1 the forward pass runs twice."""

    @property
    def encoders(self) -> float:
        """Both passes of all micro-batches."""
        return self.num_micro * ((2 if self.num_micro > 1 else 1) * self.forward + self.backward)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.encoders + self.objective + self.update


def step_tasks(config: Recipe, site: Site, transfers: Sequence[Transfer], work: Work) -> list[Task]:
    """Tasks of one step; their sending adds up to `link_time` of every transfer, their computing to `work.seconds`."""
    step, several = _Step(config, site, transfers, work), work.num_micro > 1
    alone = [transfer.name for transfer in transfers if transfer.exposed]
    step.forward(work.num_micro)
    for name in alone:
        if name not in AFTER_BACKWARD:
            step.wait_for(name)
    step.compute(work.objective)
    for number in range(1, work.num_micro + 1):
        if several:
            step.forward(1)
        step.backward(is_last=number == work.num_micro)
    step.compute(work.update, after_sending=True)
    for name in alone:
        if name in AFTER_BACKWARD:
            step.wait_for(name)
    return step.tasks


@dataclass(frozen=True)
class _Piece:
    """A part of a collective."""

    place: int
    """Unit of the pass that needs it, or that it comes after."""
    size: int
    """Elements, and in the width in which they travel."""
    bytes: int


class _Step:
    """Tasks so far, and the last of each queue."""

    def __init__(self, config: Recipe, site: Site, transfers: Sequence[Transfer], work: Work) -> None:
        self.tasks: list[Task] = []
        self._computed: tuple[int, ...] = ()
        self._sent: tuple[int, ...] = ()
        self._awaited: tuple[int, ...] = ()
        self._work, self._units = work, encoder_units(config.model)
        self._sharding = sharding_of(config, site.world_size)
        self._width = BF16 if config.train.precision == "bf16" else FP32
        self._times = {transfer.name: link_time(transfer, site) for transfer in transfers}
        n = work.num_micro
        reductions = n if self._sharding.reduces_often else 1
        self._keeps = self._sharding.engine == "fsdp2" and not config.engine.fsdp.reshard_after_forward
        self._has_all = False
        gatherings = 2 * n if n > 1 and not self._keeps else n
        self._rounds = {FORWARD: gatherings, BACKWARD: n, **dict.fromkeys(GRADIENTS, reductions)}

    def compute(self, seconds: float, *needs: int, after_sending: bool = False) -> None:
        """The GPU's next piece."""
        self.tasks.append(Task(seconds, (*needs, *self._awaited, *(self._sent if after_sending else ()))))
        self._computed, self._awaited = (len(self.tasks) - 1,), ()

    def send(self, name: str, seconds: float) -> int:
        """The network's next piece, of what has been computed until now; its place among the tasks."""
        self.tasks.append(Task(seconds, self._computed, name))
        self._sent = (len(self.tasks) - 1,)
        return self._sent[0]

    def wait_for(self, name: str) -> None:
        """A whole collective that computation waits for."""
        self._awaited = (self.send(name, self._times[name].seconds),)

    def forward(self, times: int) -> None:
        """Forward passes of so many micro-batches."""
        if FORWARD not in self._times:
            self.compute(times * self._work.forward)
            return
        for _ in range(times):
            name = "" if self._has_all else FORWARD
            self._pass(name, self._units, [self._work.forward * unit.forward for unit in self._units], [])
            self._has_all = self._keeps

    def backward(self, *, is_last: bool) -> None:
        """A micro-batch's backward pass, with what travels beside it."""
        units, self._has_all = self._units[::-1], False
        sends = "gradients" in self._times and (is_last or self._sharding.reduces_often)
        if not sends and BACKWARD not in self._times:
            self.compute(self._work.backward)
            return
        shares = [unit.forward if unit.trained else 0.0 for unit in units]
        seconds = [self._work.backward * share / (sum(shares) or 1.0) for share in shares]
        self._pass(BACKWARD, units, seconds, self._reductions(units) if sends else [])

    def _pass(self, name: str, units: Sequence[Unit], seconds: Sequence[float], reductions: list[_Piece]) -> None:
        """Units one by one: what may be gathered ahead, the unit's computation, the gradients that it completes."""
        gatherings = self._gatherings(units, name) if name in self._times else []
        sent: list[int] = []
        for place, spent in enumerate(seconds):
            needed = sum(piece.place <= place for piece in gatherings)
            for piece in gatherings[len(sent) : self._reach(name, gatherings, needed)]:
                sent.append(self.send(name, self._seconds(name, piece, gatherings)))
            self.compute(spent, *sent[:needed][-1:])
            for piece in reductions:
                if piece.place == place:
                    self._reduce(piece, reductions)

    def _reduce(self, piece: _Piece, pieces: Sequence[_Piece]) -> None:
        for name in GRADIENTS:
            if name in self._times:
                sent = self.send(name, self._seconds(name, piece, pieces))
                if not self._sharding.overlaps:
                    self._awaited = (sent,)

    def _seconds(self, name: str, piece: _Piece, pieces: Sequence[_Piece]) -> float:
        """Of a piece: by its bytes what sending takes, of the calls' latency an equal part."""
        time, rounds = self._times[name], self._rounds[name]
        share = piece.bytes / sum(each.bytes for each in pieces)
        return (time.sending * share + time.latency / len(pieces)) / rounds

    def _gatherings(self, units: Sequence[Unit], name: str) -> list[_Piece]:
        """In the order of their need. FSDP2 gathers what is in no block together, before everything else."""
        pieces = [
            _Piece(place, unit.size, unit.size * (self._width if unit.is_block else FP32))
            for place, unit in enumerate(units)
            if unit.size and (unit.trained or name == FORWARD)
        ]
        if self._sharding.engine != "fsdp2":
            return pieces
        root = [piece for piece in pieces if not units[piece.place].is_block]
        whole = _Piece(0, sum(piece.size for piece in root), sum(piece.bytes for piece in root))
        return [whole, *(piece for piece in pieces if piece not in root)]

    def _reach(self, name: str, gatherings: Sequence[_Piece], needed: int) -> int:
        """How many gatherings may be under way when so many are needed: FSDP2 has one ahead, ZeRO 3 a bucket, or none
        where it has lost sight of what comes next.
        """
        if self._sharding.engine == "fsdp2":
            return needed + 1
        if name == BACKWARD and self._work.num_micro > 1:
            return needed
        ahead = itertools.accumulate(piece.size for piece in gatherings[needed:])
        return needed + sum(size <= self._sharding.prefetch for size in ahead)

    def _reductions(self, units: Sequence[Unit]) -> list[_Piece]:
        """Where in a backward pass gradients are sent: a bucket when the next unit's do not fit into it any more.
        FSDP2 sends block by block, and what is in none at the end.
        """
        last, is_fsdp = len(units) - 1, self._sharding.engine == "fsdp2"
        limit = DDP_BUCKET // FP32 if self._sharding.engine == "ddp" else self._sharding.bucket or math.inf
        pieces, held, root = [], 0, 0
        for place, unit in enumerate(units):
            if is_fsdp and not unit.is_block:
                root += unit.trained
                continue
            held += unit.trained
            following = units[place + 1].trained if place < last else math.inf
            if held and (is_fsdp or held + following > limit):
                pieces.append(_Piece(place, held, FP32 * held))
                held = 0
        left = held + root
        return [*pieces, _Piece(last, left, FP32 * left)] if left else pieces
