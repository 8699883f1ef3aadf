"""The tasks of a training step in the order in which an engine starts them, for `schedule.run`.

One communicator sends in the order in which collectives are started, as NCCL's does. Gradients travel as soon as a
bucket of them is complete; FSDP2 and ZeRO 3 gather blocks ahead of their use. What of the objective and of the update
travels is waited for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from neuclip_scale.config import Recipe
from neuclip_scale.grad_cache import KeptActivations
from neuclip_scale.models.clip import Towers
from neuclip_scale.planning.links import link_time
from neuclip_scale.planning.schedule import Task
from neuclip_scale.planning.sharding import BF16, FP32, sharding_of
from neuclip_scale.planning.site import Site
from neuclip_scale.planning.traffic import DDP_BUCKET, Transfer
from neuclip_scale.planning.units import Unit, encoder_units

FORWARD, BACKWARD, EARLY = "parameters, forward", "parameters, backward", "features, early"
NOTHING_KEPT = KeptActivations()
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
    """Micro-batches; above 1 the forward pass of what is not kept runs twice."""
    kept: KeptActivations = NOTHING_KEPT
    """Of which nothing is encoded again."""
    image_share: float = 0.5
    """The pictures' part of a forward pass."""

    def again(self, number: int) -> Towers | None:
        """What of a micro-batch, counted from 0, is encoded again."""
        if self.num_micro == 1:
            return None
        return next((towers for towers, keeps in self.kept.passes(number) if not keeps), None)

    def forward_of(self, towers: Towers) -> float:
        """Seconds of a micro-batch's forward pass through these."""
        shares: dict[Towers, float] = {"both": 1.0, "image": self.image_share, "text": 1.0 - self.image_share}
        return self.forward * shares[towers]

    @property
    def encoders(self) -> float:
        """Both passes of all micro-batches."""
        again = [towers for number in range(self.num_micro) if (towers := self.again(number))]
        return self.num_micro * (self.forward + self.backward) + sum(map(self.forward_of, again))

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.encoders + self.objective + self.update


def step_tasks(config: Recipe, site: Site, transfers: Sequence[Transfer], work: Work) -> list[Task]:
    """Tasks of one step; their sending adds up to `link_time` of every transfer, their computing to `work.seconds`."""
    step = _Step(config, site, transfers, work)
    alone = [transfer.name for transfer in transfers if transfer.exposed]
    for number in range(work.num_micro):
        step.forward("both")
        if number < work.num_micro - 1:
            step.send_features()
    for name in alone:
        if name not in AFTER_BACKWARD:
            step.wait_for(name)
    step.compute(work.objective)
    for number in range(work.num_micro):
        if towers := work.again(number):
            step.forward(towers)
        step.backward(is_last=number == work.num_micro - 1)
    step.compute(work.update, after_sending=True)
    for name in alone:
        if name in AFTER_BACKWARD:
            step.wait_for(name)
    return step.finished()


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
        self._pieces: dict[str, list[tuple[int, int]]] = {}
        self._keeps = self._sharding.engine == "fsdp2" and not config.engine.fsdp.reshard_after_forward
        self._has_all = False

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

    def send_features(self) -> None:
        """A micro-batch's, of pictures and of captions, while the next is encoded."""
        if EARLY in self._times:
            self._send_piece(EARLY, 1)
            self._send_piece(EARLY, 1)

    def forward(self, towers: Towers) -> None:
        """A micro-batch's forward pass."""
        seconds = self._work.forward_of(towers)
        if FORWARD not in self._times:
            self.compute(seconds)
            return
        units = [unit for unit in self._units if towers in ("both", unit.tower)]
        share = sum(unit.forward for unit in units) or 1.0
        name = "" if self._has_all else FORWARD
        self._pass(name, units, [seconds * unit.forward / share for unit in units], [])
        self._has_all = self._keeps

    def finished(self) -> list[Task]:
        """All tasks; the pieces of a collective have taken their parts of its time: by their bytes of what sending
        takes, of the calls' latency equal ones.
        """
        for name, pieces in self._pieces.items():
            time, whole = self._times[name], sum(size for _, size in pieces)
            for place, size in pieces:
                seconds = time.sending * size / whole + time.latency / len(pieces)
                self.tasks[place] = replace(self.tasks[place], seconds=seconds)
        return self.tasks

    def backward(self, *, is_last: bool) -> None:
        """A micro-batch's backward pass, with what travels beside it."""
        units, self._has_all = self._units[::-1], self._keeps and not is_last
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
                sent.append(self._send_piece(name, piece.bytes))
            self.compute(spent, *sent[:needed][-1:])
            for piece in reductions:
                if piece.place == place:
                    self._reduce(piece)

    def _reduce(self, piece: _Piece) -> None:
        for name in GRADIENTS:
            if name in self._times:
                sent = self._send_piece(name, piece.bytes)
                if not self._sharding.overlaps:
                    self._awaited = (sent,)

    def _send_piece(self, name: str, size: int) -> int:
        """As `send`, of a collective whose pieces share its time when all are known."""
        place = self.send(name, 0.0)
        self._pieces.setdefault(name, []).append((place, size))
        return place

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
