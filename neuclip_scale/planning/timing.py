"""Seconds of a training step: a roofline of arithmetic and memory, and what the network adds by the step's order."""

from __future__ import annotations

from dataclasses import dataclass

from neuclip_scale.config import (
    ConfigError,
    Recipe,
    local_batch_size,
    num_micro_batches,
    pairs_encoded_again,
)
from neuclip_scale.grad_cache import KeptActivations
from neuclip_scale.planning.links import seconds_of
from neuclip_scale.planning.memory import encoder_trace
from neuclip_scale.planning.objective import objective_time
from neuclip_scale.planning.schedule import run
from neuclip_scale.planning.sharding import FP32, model_sizes, planned, sharding_of
from neuclip_scale.planning.site import Site
from neuclip_scale.planning.timeline import Work, step_tasks
from neuclip_scale.planning.traffic import Transfer, plan_traffic
from neuclip_scale.telemetry.flops import CaptionTokens, EncoderFlops, encoder_flops


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and what it computes on each rank."""

    encoders: float
    starting: float
    """Of these, what arithmetic does not need: the host starts operations more slowly than the GPU ends them."""
    objective: float
    update: float
    communication: float
    """Collectives that computation waits for."""
    hidden: float
    """What could run beside the encoders, in full."""
    exposed: float
    """What of that they waited for."""
    waits: dict[str, float]
    """Both kinds of waiting, by collective."""
    model_flops: int
    """Both towers forward and backward, nothing twice, on each rank."""
    hardware_flops: int
    """As they are run."""
    objective_flops: int
    mfu: float
    """Model FLOPs over the whole step's time and the GPU's peak."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.encoders + self.objective + self.update + self.communication + self.exposed


def plan_time(config: Recipe, site: Site, transfers: list[Transfer] | None = None) -> StepTime:
    """Time of a step of `config` at a site: a roofline's computation and sending, played in the order of the engine
    (`timeline`). Nothing is measured but what `site.measured` has.
    """
    W = site.world_size
    if transfers is None:
        transfers = plan_traffic(config, W, site.dataset_size)
    flops = _with_captions(encoder_flops(config.model, planned(config.model, False)), site)
    objective_flops, objective = objective_time(config, site, flops.forward, _encoder_rate(config, site))
    forward, backward, arithmetic = _passes(config, site, flops)
    several = num_micro_batches(config, W)
    work = Work(
        forward,
        backward,
        objective,
        _update(config, site),
        several,
        KeptActivations.of(config.train, several),
        flops.image_forward / flops.forward,
    )
    waits = run(step_tasks(config, site, transfers, work)).waits
    waited = {transfer.name for transfer in transfers if transfer.exposed}
    communication = sum(seconds for name, seconds in waits.items() if name in waited)
    exposed = sum(waits.values()) - communication
    hidden = sum(seconds_of(transfer, site) for transfer in transfers if not transfer.exposed)
    b = local_batch_size(config, W)
    model, seconds = b * flops.training, work.seconds + communication + exposed
    return StepTime(
        encoders=work.encoders,
        starting=max(0.0, work.encoders - arithmetic),
        objective=objective,
        update=work.update,
        communication=communication,
        hidden=hidden,
        exposed=exposed,
        waits=waits,
        model_flops=model,
        hardware_flops=flops.executed(b, pairs_encoded_again(config, W)),
        objective_flops=objective_flops,
        mfu=model / (seconds * site.gpu.peak(config.train.precision)),
    )


def _passes(config: Recipe, site: Site, flops: EncoderFlops) -> tuple[float, float, float]:
    """Seconds of a micro-batch's forward and backward pass, and what the whole step's arithmetic alone takes."""
    n, b = num_micro_batches(config, site.world_size), local_batch_size(config, site.world_size)
    rate = _encoder_rate(config, site)
    trace = encoder_trace(config.model, config.train.precision, config.engine.name == "fsdp2")
    start = site.assume.operation_us * 1e-6
    forward = b * flops.forward / rate / n
    backward = b * (flops.training + flops.recomputed - flops.forward) / rate / n
    arithmetic = flops.executed(b, pairs_encoded_again(config, site.world_size)) / rate
    floors = trace.forward_operations, trace.training_operations - trace.forward_operations
    return max(forward, floors[0] * start), max(backward, floors[1] * start), arithmetic


def _encoder_rate(config: Recipe, site: Site) -> float:
    """FLOP/s of the encoders as they are run."""
    return site.measured.encoders or site.gpu.peak(config.train.precision) * site.assume.compute


def _with_captions(flops: EncoderFlops, site: Site) -> EncoderFlops:
    """FLOPs with the captions assumed, or measured; raises `ConfigError` where what is assumed cannot be."""
    tokens, name = site.assume.caption_tokens, "--assume.caption_tokens"
    if tokens and flops.text is None:
        raise ConfigError(name, tokens, "this recipe packs no captions", "Leave it out.")
    if tokens > flops.context_length:
        problem = f"longer than the context of {flops.context_length}"
        raise ConfigError(name, tokens, problem, "Take packed_tokens of a run's metrics.jsonl.")
    tokens = tokens or min(site.measured.caption_tokens or flops.context_length, flops.context_length)
    return flops.at(CaptionTokens(tokens, tokens**2))


def _update(config: Recipe, site: Site) -> float:
    """AdamW reads value, gradient and two moments and writes three of them: seven words of each element."""
    sharding = sharding_of(config, site.world_size)
    own = model_sizes(config).trained / sharding.optimizer
    if site.measured.update and not sharding.optimizer_on_host:
        return site.measured.update * own
    words = 7 * FP32 * own
    if not sharding.optimizer_on_host:
        return words / (site.gpu.bandwidth * site.assume.memory)
    ranks = min(site.gpus_per_node, site.world_size)
    there_and_back = 2 * FP32 * own / (site.gpu.pcie * site.assume.interconnect)
    return there_and_back + ranks * words / site.assume.host_bandwidth
