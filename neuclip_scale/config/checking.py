"""What a recipe must satisfy to be run."""

from __future__ import annotations

import math
from typing import Literal

from neuclip_scale.config.errors import ConfigError
from neuclip_scale.config.schema import DataConfig, EngineConfig, ObjectiveConfig, Recipe, TrainConfig

_YEAR = 365.0 * 24 * 3600
_MOST_PIXELS = 89_478_485
"""Pillow takes larger pictures for bombs, whatever limit we have."""


def local_batch_size(recipe: Recipe, world_size: int) -> int:
    """Pairs per rank and step."""
    return recipe.train.global_batch_size // world_size


def micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """Pairs encoded at a time on one rank."""
    return recipe.train.micro_batch_size or local_batch_size(recipe, world_size)


def matmul_precision(section: TrainConfig) -> Literal["highest", "high", "medium"]:
    """How a GPU multiplies what is held in fp32, `auto` resolved."""
    if section.matmul_precision != "auto":
        return section.matmul_precision
    return "highest" if section.precision == "fp32" else "medium"


def num_micro_batches(recipe: Recipe, world_size: int) -> int:
    """Micro-batches of each rank; above 1, gradients are cached."""
    return math.ceil(local_batch_size(recipe, world_size) / micro_batch_size(recipe, world_size))


def pairs_encoded_again(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Pictures and captions of one rank's batch that are encoded twice in a step."""
    if num_micro_batches(recipe, world_size) == 1:
        return 0, 0
    train = recipe.train
    again = local_batch_size(recipe, world_size) - train.kept_micro_batches * train.micro_batch_size
    return 0 if train.kept_tower == "image" else again, 0 if train.kept_tower == "text" else again


def num_steps(recipe: Recipe, num_samples: int) -> int:
    """Optimizer steps of a run on so many samples; raises `ConfigError` where they do not fill a batch."""
    train = recipe.train
    steps = train.num_steps or int(train.epochs * num_samples) // train.global_batch_size
    if steps < 1:
        raise ConfigError(
            "train.epochs",
            train.epochs,
            f"{num_samples} pairs do not fill one batch of {train.global_batch_size}",
            "Use more epochs, a smaller train.global_batch_size, or train.num_steps.",
        )
    return steps


def check_recipe(recipe: Recipe, world_size: int = 1) -> None:
    """Raise `ConfigError` for values or combinations that cannot be run on `world_size` ranks."""
    _check_ranges(recipe)
    if abs(recipe.seed) >= 1 << 32:  # steps and epochs are added to a million times of it, in 64 bits
        raise ConfigError("seed", recipe.seed, "too large for the generators' seeds", "Give one below 2^32.")
    _check_captions(recipe.data)
    _check_batch(recipe, world_size)
    _check_kept_activations(recipe, world_size)
    _check_length_and_temperature(recipe)
    if recipe.model.cuda_graphs:
        _check_graphs(recipe)


def check_objective(section: ObjectiveConfig) -> None:
    """Raise `ConfigError` for values of a loss in another trainer that no run would take."""
    _check_ranges(Recipe(objective=section))
    if section.name in ("isogclr", "fastclip-v2"):  # the tau of the others is the trainer's
        _check_temperature(section)


def check_places(recipe: Recipe) -> None:
    """Raise `ConfigError` for a run without a folder or without data."""
    if not recipe.run_dir:
        raise ConfigError("run_dir", "", "the run has no folder", "Give --run-dir DIR.")
    for name, place in {"run_dir": recipe.run_dir, "data.train": recipe.data.train}.items():
        if place.startswith("~"):  # a shell leaves it alone after `name=` and inside quotes
            raise ConfigError(name, place, "would be a folder called ~", "Write the whole path, or $HOME.")
    if not recipe.data.train:
        raise ConfigError("data.train", "", "there is no training data", "Give --data.train SHARDS.")


def warnings_at_start(recipe: Recipe, num_steps: int) -> list[str]:
    """What to say of fields that do not do what they seem to in a run of so many steps."""
    optim, evaluation, told = recipe.optim, recipe.evaluation, [unused_length(recipe.train)]
    if optim.warmup_steps >= num_steps:
        told.append(
            f"optim.warmup_steps = {optim.warmup_steps} is as long as the run of {num_steps} steps: the learning rate "
            "only rises. Give fewer."
        )
    elif optim.warmup_steps + optim.cooldown_steps > num_steps:
        told.append(
            f"optim.cooldown_steps = {optim.cooldown_steps} begins before optim.warmup_steps = {optim.warmup_steps} "
            f"end in a run of {num_steps} steps: the learning rate drops from its peak at once. Give fewer."
        )
    if not evaluation.data and (evaluation.every_steps or evaluation.at_samples):
        name = "every_steps" if evaluation.every_steps else "at_samples"
        told.append(f"evaluation.{name} does not count: there is nothing to evaluate. Give evaluation.data.")
    beyond = [number for number in evaluation.at_samples if number > num_steps * recipe.train.global_batch_size]
    if beyond:
        samples = f"{num_steps * recipe.train.global_batch_size:,}"
        told.append(f"evaluation.at_samples = {beyond}: the run ends after {samples} samples. Give fewer.")
    for name, library in (("fsdp2", "fsdp"), ("deepspeed", "deepspeed")):
        if recipe.engine.name != name and getattr(recipe.engine, library) != getattr(EngineConfig(), library):
            told.append(
                f"engine.{library}.* does not count with engine.name={recipe.engine.name}. Give engine.name={name}."
            )
    return [warning for warning in told if warning]


def unused_length(section: TrainConfig) -> str:
    """What to say of a length that does not count; empty where none was given."""
    if not (section.num_steps and section.epochs):
        return ""
    return (
        f"train.epochs = {section.epochs:g} does not count: train.num_steps = {section.num_steps} decides. "
        "Add train.num_steps=0 to go by epochs."
    )


def _check_ranges(recipe: Recipe) -> None:
    """Each number by itself."""
    positive = {
        "data.num_streams": recipe.data.num_streams,
        "data.shuffle_window": recipe.data.shuffle_window,
        "data.prefetch_batches": recipe.data.prefetch_batches,
        "data.max_image_pixels": recipe.data.max_image_pixels,
        "data.cache_gib": recipe.data.cache_gib,
        "data.stall_warning_seconds": recipe.data.stall_warning_seconds,
        "train.global_batch_size": recipe.train.global_batch_size,
        "train.log_every_steps": recipe.train.log_every_steps,
        "objective.temperature_init": recipe.objective.initial_temperature,
        "objective.temperature_min": recipe.objective.temperature_min,
        "objective.tile_size": recipe.objective.tile_size,
        "objective.npn.num_prototypes": recipe.objective.npn.num_prototypes,
        "objective.npn.updates_per_step": recipe.objective.npn.updates_per_step,
        "objective.npn.learning_rate": recipe.objective.npn.learning_rate,
        "objective.amortized.hidden_factor": recipe.objective.amortized.hidden_factor,
        "objective.amortized.learning_rate": recipe.objective.amortized.learning_rate,
        "objective.amortized.updates_per_step": recipe.objective.amortized.updates_per_step,
        "objective.amortized.ema_every": recipe.objective.amortized.ema_every,
        "objective.individual.learning_rate": recipe.objective.individual.learning_rate,
        "objective.individual.max_gradient": recipe.objective.individual.max_gradient,
        "optim.learning_rate": recipe.optim.learning_rate,
        "optim.eps": recipe.optim.eps,
        "optim.image.learning_rate_factor": recipe.optim.image.learning_rate_factor,
        "optim.text.learning_rate_factor": recipe.optim.text.learning_rate_factor,
        "optim.image.layer_decay": recipe.optim.image.layer_decay,
        "optim.text.layer_decay": recipe.optim.text.layer_decay,
        "optim.cooldown_power": recipe.optim.cooldown_power,
        "checkpoint.keep": recipe.checkpoint.keep,
        "objective.exact_refresh_every": recipe.objective.exact_refresh_every,
        "engine.fsdp.replicas": recipe.engine.fsdp.replicas,
        "evaluation.at_samples": min(recipe.evaluation.at_samples, default=1),
        **{f"data.weights[{i}]": weight for i, weight in enumerate(recipe.data.weights)},
    }
    not_negative = {
        "data.num_workers": recipe.data.num_workers,
        "data.stall_timeout_seconds": recipe.data.stall_timeout_seconds,
        "data.max_worker_memory_gib": recipe.data.max_worker_memory_gib,
        "train.micro_batch_size": recipe.train.micro_batch_size,
        "train.kept_micro_batches": recipe.train.kept_micro_batches,
        "train.num_steps": recipe.train.num_steps,
        "train.epochs": recipe.train.epochs,
        "train.hang_timeout_seconds": recipe.train.hang_timeout_seconds,
        "train.max_grad_norm": recipe.train.max_grad_norm,
        "checkpoint.keep_every_steps": recipe.checkpoint.keep_every_steps,
        "optim.weight_decay": recipe.optim.weight_decay,
        "optim.image.weight_decay_factor": recipe.optim.image.weight_decay_factor,
        "optim.text.weight_decay_factor": recipe.optim.text.weight_decay_factor,
        "optim.cooldown_steps": recipe.optim.cooldown_steps,
        "model.unlocked_layers": recipe.model.unlocked_layers,
        "optim.warmup_steps": recipe.optim.warmup_steps,
        "optim.temperature_learning_rate": recipe.optim.temperature_learning_rate,
        "optim.temperature_drop_at": recipe.optim.temperature_drop_at,
        "objective.eps": recipe.objective.eps,
        "objective.rho": recipe.objective.rho,
        "objective.gamma_decay_epochs": recipe.objective.gamma_decay_epochs,
        "objective.queue.size": recipe.objective.queue.size,
        "objective.amortized.blend_epochs": recipe.objective.amortized.blend_epochs,
        "model.image_size": recipe.model.image_size,
        "model.image_layers": recipe.model.image_layers,
        "model.text_layers": recipe.model.text_layers,
        "objective.npn.restart_every": recipe.objective.npn.restart_every,
        "checkpoint.every_steps": recipe.checkpoint.every_steps,
        "evaluation.every_steps": recipe.evaluation.every_steps,
        "evaluation.normalizer_every_steps": recipe.evaluation.normalizer_every_steps,
        "evaluation.normalizer_reference": recipe.evaluation.normalizer_reference,
    }
    _check_signs(positive, not_negative)
    for name, value in (positive | not_negative).items():
        if name.endswith("_seconds") and value > _YEAR:
            raise ConfigError(name, value, "more than a year", f"Give {_YEAR:.0f} at most.")
    rho = {f"objective.amortized.rho[{i}]": value for i, value in enumerate(recipe.objective.amortized.rho)}
    for name, value in {"objective.bias_init": recipe.objective.bias_init, **rho}.items():
        if not math.isfinite(value):
            raise ConfigError(name, value, "not finite", "Give a number.")
    _check_fractions(recipe)
    if recipe.data.max_image_pixels > _MOST_PIXELS:
        raise ConfigError(
            "data.max_image_pixels",
            recipe.data.max_image_pixels,
            f"Pillow refuses pictures of more than {_MOST_PIXELS} pixels",
            f"Give {_MOST_PIXELS} at most.",
        )


def _check_signs(positive: dict[str, float], not_negative: dict[str, float]) -> None:
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ConfigError(name, value, "must be above zero and finite", "Give a positive number.")
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(name, value, "must not be negative or infinite", "Give zero or a positive number.")


def _check_fractions(recipe: Recipe) -> None:
    for name, value in {
        "data.max_bad_fraction": recipe.data.max_bad_fraction,
        "model.dropout": recipe.model.dropout,
        "objective.gamma_min": recipe.objective.gamma_min,
        "objective.queue.batch_weight": recipe.objective.queue.batch_weight,
        "objective.amortized.blend_max": recipe.objective.amortized.blend_max,
        "objective.amortized.ema": recipe.objective.amortized.ema,
        "objective.amortized.positive_weight": recipe.objective.amortized.positive_weight,
    }.items():
        if not 0.0 <= value <= 1.0:
            raise ConfigError(name, value, "not a fraction", "Give a number from 0 to 1.")
    if recipe.model.dropout == 1.0:
        raise ConfigError("model.dropout", 1.0, "would drop everything", "Give a number below 1.")
    for name, value in {"optim.ema_decay": recipe.optim.ema_decay, "optim.momentum": recipe.optim.momentum}.items():
        if not 0.0 <= value < 1.0:
            raise ConfigError(name, value, "not in [0, 1)", "Give a fraction below 1, 0 for none.")
    betas = {"optim.betas": recipe.optim.betas, "objective.individual.betas": recipe.objective.individual.betas}
    for name, pair in betas.items():
        for i, beta in enumerate(pair):
            if not 0.0 <= beta < 1.0:
                raise ConfigError(f"{name}[{i}]", beta, "not in [0, 1)", "Adam's are near 0.9 and 0.98.")
    if not recipe.objective.amortized.rho:
        raise ConfigError("objective.amortized.rho", [], "no weight at all", "Give at least one, 0 for none.")
    low, high = recipe.data.crop_scale
    if not 0.0 < low <= high <= 1.0:
        raise ConfigError("data.crop_scale", recipe.data.crop_scale, "not a range in (0, 1]", "Give [low, high].")


def _check_captions(data: DataConfig) -> None:
    for name, places in {"data.caption_key": (data.caption_key,), "data.captions": data.captions}.items():
        for place in places:
            member, colon, field = place.partition(":")
            if not member or (colon and not field):
                remedy = "Give an extension (txt) or a field of a JSON member (json:caption)."
                raise ConfigError(name, place, "names no place of a caption", remedy)
    if data.captions and data.caption_key != "txt":
        raise ConfigError(
            "data.caption_key", data.caption_key, "data.captions is given too", "Move it into data.captions."
        )
    weights = data.caption_weights
    if weights and len(weights) != len(data.captions):
        problem = f"{len(weights)} weight(s) for {len(data.captions)} place(s) in data.captions"
        raise ConfigError("data.caption_weights", weights, problem, "Give one for each, or none.")
    if not all(0 <= weight < math.inf for weight in weights) or (weights and sum(weights) == 0):
        raise ConfigError(
            "data.caption_weights", weights, "not frequencies", "Give finite ones, none negative, one above zero."
        )


def _check_batch(recipe: Recipe, world_size: int) -> None:
    batch, streams = recipe.train.global_batch_size, recipe.data.num_streams
    if batch < 2:
        raise ConfigError("train.global_batch_size", batch, "a contrastive batch needs negatives", "Give at least 2.")
    if streams % world_size:
        fitting = [count for count in range(world_size, batch + 1, world_size) if batch % count == 0]
        nearest_count = min(fitting, key=lambda count: abs(count - streams), default=0)
        raise ConfigError(
            "data.num_streams",
            streams,
            f"not a multiple of the {world_size} ranks",
            f"Use {f'{nearest_count}, or ' if fitting else ''}a world size that divides {streams}.",
        )
    if batch % streams:
        lower = batch // streams * streams
        nearest = f"{lower} or {lower + streams}" if lower else str(streams)
        raise ConfigError(
            "train.global_batch_size",
            batch,
            f"not a multiple of data.num_streams = {streams}, so the streams cannot take equal shares",
            f"Use {nearest}, or another data.num_streams; it is never rounded.",
        )
    local, micro = local_batch_size(recipe, world_size), recipe.train.micro_batch_size
    if micro > local:
        raise ConfigError(
            "train.micro_batch_size",
            micro,
            f"larger than the local batch of {local} ({batch} pairs over {world_size} ranks)",
            f"Use at most {local}, or 0 for the whole local batch.",
        )


def _check_kept_activations(recipe: Recipe, world_size: int) -> None:
    several = num_micro_batches(recipe, world_size)
    kept, tower = recipe.train.kept_micro_batches, recipe.train.kept_tower
    if several == 1 and (kept > 1 or tower):
        name, value = ("train.kept_micro_batches", kept) if kept > 1 else ("train.kept_tower", tower)
        problem = "a rank's batch is one micro-batch, of which everything is kept"
        raise ConfigError(name, value, problem, "Leave it out, or give a smaller train.micro_batch_size.")
    if kept >= several > 1:
        raise ConfigError(
            "train.kept_micro_batches",
            kept,
            f"a rank has {several} micro-batch(es)",
            f"Use at most {several - 1}, or keep everything with train.micro_batch_size = 0.",
        )


def _check_length_and_temperature(recipe: Recipe) -> None:
    if not recipe.train.num_steps and not recipe.train.epochs:
        raise ConfigError("train.num_steps", 0, "the run has no length", "Give train.num_steps or train.epochs.")
    _check_temperature(recipe.objective)
    model, optim = recipe.model, recipe.optim
    if model.unlocked_layers and not model.lock:
        raise ConfigError(
            "model.unlocked_layers", model.unlocked_layers, "no tower is locked", "Give model.lock, or set it to 0."
        )
    if model.pretrained_towers != "both" and not model.pretrained:
        raise ConfigError(
            "model.pretrained_towers", model.pretrained_towers, "there are no weights to take", "Give model.pretrained."
        )
    if (optim.schedule == "cooldown") != (optim.cooldown_steps > 0):
        raise ConfigError(
            "optim.cooldown_steps",
            optim.cooldown_steps,
            f"does not go with optim.schedule = {optim.schedule}",
            "The schedule cooldown needs steps for it, and the others have none.",
        )
    if recipe.train.precision == "fp16" and recipe.engine.device == "cpu":
        raise ConfigError(
            "train.precision", "fp16", "fp16 needs a GPU's loss scaling", "Use bf16 or fp32 with engine.device=cpu."
        )


def _check_temperature(objective: ObjectiveConfig) -> None:
    if not objective.temperature_min <= objective.initial_temperature <= objective.temperature_max:
        raise ConfigError(
            "objective.temperature_init",
            objective.initial_temperature,
            f"outside [{objective.temperature_min}, {objective.temperature_max}]",
            "Move it inside, or move objective.temperature_min or temperature_max.",
        )


def _check_graphs(recipe: Recipe) -> None:
    problem = remedy = ""
    if recipe.model.compile is False:
        problem, remedy = "only compiled towers are recorded", "Set model.compile to auto or True."
    elif recipe.engine.name == "fsdp2":
        problem = "FSDP2 gathers parameters at another place in memory each time, and a graph has them at one"
        remedy = "Turn it off, or use engine.name=ddp."
    elif recipe.model.dropout:
        problem, remedy = "a graph with dropout was never tried", "Turn it off, or set model.dropout to 0."
    if problem:
        raise ConfigError("model.cuda_graphs", True, problem, remedy)
