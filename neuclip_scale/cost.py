"""What a run has cost, over all the times it was resumed: time, arithmetic, energy, memory, and where its steps spent.

Only training steps count: not evaluation, measurements of the normalizers, checkpoints or indexing. The peak of memory
alone is that of the whole process, whatever it did then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from neuclip_scale import distributed
from neuclip_scale.config import Recipe, local_batch_size, matmul_precision, pairs_encoded_again
from neuclip_scale.data.batch import Batch
from neuclip_scale.models.clip import CLIP
from neuclip_scale.objectives import Objective
from neuclip_scale.similarity import BatchShape
from neuclip_scale.telemetry import peak_memory_bytes
from neuclip_scale.telemetry.devices import peak_flops
from neuclip_scale.telemetry.energy import EnergyMeter, NoMeter, energy_meter
from neuclip_scale.telemetry.flops import CaptionTokens, EncoderFlops, encoder_flops, every_token_flops


class PackedTokens(NamedTuple):
    """Of a step's captions, which were packed."""

    needed: CaptionTokens
    """Up to their ends."""
    run: CaptionTokens
    """As long as the rectangles they were packed into."""

    @classmethod
    def of_means(cls, means: Sequence[float]) -> PackedTokens:
        """The opposite of [*needed, *run]."""
        return cls(CaptionTokens(*means[:2]), CaptionTokens(*means[2:]))

    @classmethod
    def of(cls, micro_batches: Sequence[Batch], model: CLIP) -> PackedTokens | None:
        """Of a rank's micro-batches; None where the model does not pack them."""
        needed = [length for batch in micro_batches for length in batch.text_lengths]
        if not model.packs_captions or not needed:
            return None
        run = [
            rectangle
            for batch in micro_batches
            for rectangle in (batch.packing.rectangles if batch.packing else ((len(batch), model.context_length),))
        ]
        sums = [sum(length**power for length in needed) for power in (1, 2)]
        sums += [sum(captions * length**power for captions, length in run) for power in (1, 2)]
        return cls.of_means([each / len(needed) for each in sums])


@dataclass(frozen=True)
class StepArithmetic:
    """FLOPs of a training step over all ranks."""

    encoders: EncoderFlops
    shape: BatchShape
    again: tuple[int, int]
    """Pictures and captions of each rank that are encoded twice."""
    peak_flops: float
    """Dense peak of one device in FLOP/s; 0 where it is not known, as a CPU's."""
    all_tokens: int
    """Of one pair, with every token of every block; 0 where no peak is known."""

    @classmethod
    def of(cls, model: CLIP, config: Recipe, world_size: int, device: torch.device) -> StepArithmetic:
        """Count for a recipe's model and batch sizes. No communication."""
        local_size = local_batch_size(config, world_size)
        precision: str = config.train.precision
        if precision == "fp32":  # which tensor cores may take for less
            precision = {"highest": "fp32", "high": "tf32", "medium": "bf16"}[matmul_precision(config.train)]
        peak = device_peak_flops(device, precision)
        return cls(
            encoder_flops(config.model, model),
            BatchShape(local_size, config.train.global_batch_size, model.embed_dim),
            pairs_encoded_again(config, world_size),
            peak,
            every_token_flops(model) if peak else 0,
        )

    def model_flops(self, captions: PackedTokens | None) -> int:
        """Both towers forward and backward, nothing twice; captions up to their ends, or (None) the whole context."""
        encoders = self.encoders.at(captions.needed) if captions else self.encoders
        return encoders.training * self.shape.global_size

    def hardware_flops(self, captions: PackedTokens | None) -> int:
        """Both towers as they are run: with the second forward pass of gradient caching, and recomputation."""
        encoders = self.encoders.at(captions.run) if captions else self.encoders
        return encoders.executed(self.shape.local_size, self.again) * self.shape.world_size

    def metrics(self, captions: PackedTokens | None, seconds: float) -> dict[str, float]:
        """What metrics.jsonl says of a step of this length: its packed captions, and MFU where a peak is known."""
        flops = self.model_flops(captions)
        found: dict[str, float] = {}
        if captions is not None:
            found = {"caption_tokens": captions.needed.mean, "packed_tokens": captions.run.mean}
            found["flops_per_pair"] = flops / self.shape.global_size
        if possible := self.peak_flops * self.shape.world_size * seconds:
            found |= {"mfu": flops / possible, "mfu_all_tokens": self.all_tokens * self.shape.global_size / possible}
        return found

    def facts(self, num_steps: int) -> dict[str, float]:
        """What someone needs who works out progress and MFU from outside; peak_flops of one device, 0 unknown."""
        return {
            "num_steps": num_steps,
            "world_size": self.shape.world_size,
            "global_batch_size": self.shape.global_size,
            "flops_per_pair": self.encoders.training,
            "peak_flops": self.peak_flops,
        }

    def objective_flops(self, objective: Objective) -> int:
        """Similarities, their gradients and normalizers; may change with the objective's epoch."""
        return objective.flops(self.shape) * self.shape.world_size


def device_peak_flops(device: torch.device, precision: str) -> float:
    """Dense peak of a GPU in FLOP/s; 0 for a CPU, and where it is not known."""
    return (peak_flops(torch.cuda.get_device_name(device), precision) or 0.0) if device.type == "cuda" else 0.0


class RunCost:
    """Sums over the steps of a run. Counters are equal on all ranks; times of sections are each rank's own."""

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.device_seconds = 0.0
        self.model_flops = 0
        self.hardware_flops = 0
        self.objective_flops = 0
        self.packed_steps, self.packed_tokens = 0, 0.0
        """Steps whose captions were packed, and the sum over these of a caption's mean tokens."""
        self.sections: dict[str, float] = {}
        self.peaks: list[float] = []
        """Peaks of the devices that have computed: a run may go on on others, or in another precision."""
        self.since_step = 0
        """Step after which all but the seconds were counted; above 0 for a run that older code began."""
        # Of earlier processes of this run, over all ranks; this process's are added when they are asked for.
        self._joules = 0.0
        self._sources: list[str] = []
        self._peak_memory = 0
        self._meter: EnergyMeter = NoMeter()

    @contextmanager
    def metered(self, device: torch.device) -> Iterator[None]:
        """Count energy inside."""
        if isinstance(self._meter, NoMeter):  # else the same process goes on with the run
            self._meter = energy_meter(device, local_rank=distributed.read_launch().local_rank)
        self._meter.start()
        try:
            yield
        finally:
            self._meter.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training: its energy does not count."""
        self._meter.stop()
        try:
            yield
        finally:
            self._meter.start()

    def add_step(
        self,
        seconds: float,
        sections: Mapping[str, float],
        arithmetic: StepArithmetic,
        objective_flops: int,
        captions: PackedTokens | None = None,
    ) -> None:
        """Count one finished step; `captions` where they were packed."""
        self.train_seconds += seconds
        self.device_seconds += seconds * arithmetic.shape.world_size
        self.model_flops += arithmetic.model_flops(captions)
        self.hardware_flops += arithmetic.hardware_flops(captions)
        self.objective_flops += objective_flops
        if arithmetic.peak_flops not in self.peaks:
            self.peaks.append(arithmetic.peak_flops)
        if captions is not None:
            self.packed_steps += 1
            self.packed_tokens += captions.run.mean
        for name, spent in sections.items():
            self.sections[name] = self.sections.get(name, 0.0) + spent
        self._meter.tick()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (collective)."""
        joules, sources, peak_memory = self._over_ranks()
        return {
            "device_seconds": self.device_seconds,
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "objective_flops": self.objective_flops,
            "packed_steps": self.packed_steps,
            "packed_tokens": self.packed_tokens,
            "sections": dict(self.sections),
            "peaks": list(self.peaks),
            "since_step": self.since_step,
            "energy_joules": joules,
            "energy_sources": sources,
            "peak_memory_bytes": peak_memory,
        }

    def load(self, shared: Mapping[str, Any], num_ranks: int) -> None:
        """Go on from what a checkpoint of `num_ranks` ranks holds, also from one without `state`'s."""
        self.train_seconds = shared["train_seconds"]
        state = shared.get("cost")
        if state is None:
            self.device_seconds, self.since_step = self.train_seconds * num_ranks, shared["step"]
            return
        self.device_seconds, self.since_step = state["device_seconds"], state["since_step"]
        self.model_flops, self.hardware_flops = state["model_flops"], state["hardware_flops"]
        # Older code packed nothing and saved neither.
        self.packed_steps, self.packed_tokens = state.get("packed_steps", 0), state.get("packed_tokens", 0.0)
        self.objective_flops, self.sections = state["objective_flops"], dict(state["sections"])
        self.peaks = list(state.get("peaks", []))  # older code did not tell
        self._joules, self._sources = state["energy_joules"], list(state["energy_sources"])
        self._peak_memory = state["peak_memory_bytes"]

    def summary(self, arithmetic: StepArithmetic, num_steps: int) -> dict[str, Any]:
        """What summary.json holds as `cost` of a run that has made so many steps (collective)."""
        joules, sources, peak_memory = self._over_ranks()
        whole = sum(self.sections.values())
        largest_first = sorted(self.sections.items(), key=lambda item: -item[1])
        cost: dict[str, Any] = {
            "since_step": self.since_step,
            "train_seconds": self.train_seconds,
            "device_hours": self.device_seconds / 3600,
            "flops_per_pair": arithmetic.encoders.training,
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "objective_flops": self.objective_flops,
            "energy_joules": joules,
            "energy_source": "; ".join(sources),
            "peak_memory_bytes": peak_memory,
            "sections": {name: {"seconds": spent, "share": spent / whole} for name, spent in largest_first},
        }
        if self.packed_steps:
            cost["packed_tokens"] = self.packed_tokens / self.packed_steps
        possible = self.device_seconds * arithmetic.peak_flops
        if possible and self.since_step == 0 and len(self.peaks) <= 1:
            cost |= {"peak_flops_per_second": arithmetic.peak_flops, "mfu": self.model_flops / possible}
            cost["mfu_all_tokens"] = arithmetic.all_tokens * arithmetic.shape.global_size * num_steps / possible
        return cost

    def _over_ranks(self) -> tuple[float, list[str], int]:
        """Joules, their sources and the highest peak of memory over all ranks, earlier processes included."""
        self._meter.update()
        ranks = distributed.gather_objects((self._meter.joules, self._meter.source, peak_memory_bytes()))
        sources = [*self._sources, *(source for _, source, _ in ranks if source)]
        return (
            self._joules + sum(joules for joules, _, _ in ranks),
            list(dict.fromkeys(sources)),
            max(self._peak_memory, *(peak for _, _, peak in ranks)),
        )
