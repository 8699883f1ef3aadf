"""The recipe of a run: frozen dataclasses, strict YAML, dotted overrides, and the resolved copy kept with the run.

Every value that changes what is computed is a field here, with its help text below it (tyro shows it in `--help`).
Nothing is ignored and nothing is rounded: an unknown key, a wrong type or a combination that cannot work is a
`ConfigError` that names the field, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")

ObjectiveName = Literal["openclip", "fastclip-v3", "neuclip"]


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the field, its value and the remedy."""

    def __init__(self, field_name: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{field_name} = {value!r}: {problem}. {remedy}")
        self.field_name, self.value, self.problem, self.remedy = field_name, value, problem, remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        # Errors of rank 0 travel pickled to the other ranks.
        return type(self), (self.field_name, self.value, self.problem, self.remedy)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    preset: str = "ViT-B-32"
    """Architecture: a name from `neuclip_scale.models.presets` (ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14, RN50, demo)."""
    image_tower: str = ""
    """A timm model name that replaces the preset's image tower; empty keeps the preset's."""
    text_tower: str = ""
    """A transformers encoder (name or local folder) that replaces the preset's text tower; empty keeps the preset's."""
    image_size: int = 0
    """Input resolution in pixels; 0 takes the preset's."""
    dropout: float = 0.0
    """Dropout inside the transformer blocks of both towers."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile both towers with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = ""
    """Training shards: a folder, a brace pattern (`/data/{00000..01023}.tar`), a glob, or several joined with `::`."""
    num_streams: int = 8
    """Canonical streams. Any world size that divides it sees the same global batches in the same order."""
    shuffle_window: int = 4096
    """Samples of one stream that are permuted together; shards themselves are permuted every epoch."""
    num_workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process. Does not change the data order."""
    prefetch_batches: int = 2
    """Batches that each worker prepares ahead."""
    image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Tar member extensions that hold the picture, first match wins."""
    caption_key: str = "txt"
    """Tar member extension that holds the caption (UTF-8)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area range of the random resized crop; open_clip's default."""
    max_image_pixels: int = 50_000_000
    """Pictures of more pixels are refused before they are decoded (decompression bombs)."""
    max_bad_fraction: float = 0.02
    """Training stops when more than this fraction of the samples read was unusable; fewer are counted and listed."""


@dataclass(frozen=True, kw_only=True)
class NPNConfig:
    num_prototypes: int = 4096
    """m, the number of prototypes per side."""
    updates_per_step: int = 10
    """T_u, AdaGrad updates of the prototypes before each encoder step."""
    restart_every: int = 500
    """T_r, steps between restarts from sampled embeddings; 0 never restarts after the first."""
    learning_rate: float = 0.01
    """AdaGrad's learning rate."""
    prototype_source: Literal["batch", "recent"] = "recent"
    """Embeddings a restart samples from: the current global batch, or a store of the most recent past batches."""
    reset_accumulator: bool = True
    """Whether a restart also clears AdaGrad's accumulated squares."""
    exclude_own: bool = True
    """Whether an anchor leaves out the prototype that was made from its own pair."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: ObjectiveName = "neuclip"
    """Training objective."""
    temperature_init: float = 0.07
    """tau at the start; the model stores log(1/tau)."""
    temperature_min: float = 0.01
    """Lower bound of tau."""
    temperature_max: float = 1.0
    """Upper bound of tau."""
    rho: float = 8.5
    """Weight of the 2 rho tau term that keeps a learned tau from collapsing (fastclip-v3, neuclip)."""
    eps: float = 1e-6
    """Added to the normalizer before its logarithm."""
    gamma_min: float = 0.2
    """Smallest weight of the newest estimate in the u table (fastclip-v3)."""
    gamma_decay_epochs: int = 0
    """Epochs over which gamma falls from 1 to gamma_min along a cosine; 0 takes the length of the run."""
    tile_size: int = 1024
    """Edge of the similarity tiles, in rows; bounds the memory of the loss."""
    npn: NPNConfig = field(default_factory=NPNConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float = 5e-4
    """Peak learning rate of the encoders."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.2
    """Applied to tensors of two and more dimensions; biases, norms, gains and logit_scale are exempt, as in open_clip."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up."""
    temperature_learning_rate: float = 0.0
    """Peak learning rate of log(1/tau); 0 takes the encoders'."""
    temperature_drop_at: float = 0.0
    """Once tau is at most this, its learning rate falls to a third (FastCLIP, NeuCLIP: 0.03); 0 never."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    global_batch_size: int = 1024
    """Pairs per step over all ranks: the contrastive batch."""
    micro_batch_size: int = 0
    """Pairs encoded at a time on one rank; smaller than the local batch turns on the gradient cache. 0: the local batch."""
    num_steps: int = 0
    """Optimizer steps; 0 derives them from `epochs`."""
    epochs: float = 0.0
    """Passes over the data, used when num_steps is 0; a last incomplete batch is not taken."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the encoders; losses and normalizers are always fp32."""
    max_grad_norm: float = 0.0
    """Clip the encoders' gradient to this norm; 0 does not clip."""
    log_every_steps: int = 10
    """Steps between lines on the console; metrics.jsonl has every step."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 2
    """Newest checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    name: Literal["ddp"] = "ddp"
    """How the encoders are spread over the ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU when there is one."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    data: str = ""
    """Folder with evaluation sets (`zeroshot/`, `retrieval/`); empty skips evaluation."""
    every_steps: int = 0
    """Steps between evaluations during training; 0 evaluates at the end only."""
    normalizer_every_steps: int = 0
    """Steps between measurements of the normalizer's error against the exact value; 0 never."""
    normalizer_reference: int = 0
    """Training pairs that the exact value is computed over; 0 takes all (reported with the result)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One complete training run."""

    name: str = "run"
    """Name of the recipe, for people."""
    run_dir: str = ""
    """Folder that receives config, metrics, checkpoints and results."""
    resume: str = "auto"
    """auto continues from the newest checkpoint in run_dir, never refuses a run_dir that has one, PATH loads that one."""
    seed: int = 0
    """Seed of the initial weights, the data order, augmentation and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = resources.files("neuclip_scale") / "recipes"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    `path` is a packaged name (`demo`, `cc3m`, ...) or a YAML file; `overrides` maps dotted names to values, or is a
    list of `section.field=value` strings whose values are YAML. Raises `ConfigError`; does not check what depends on
    the world size (see `check_recipe`).
    """
    values = _read_yaml(path)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_split_override, overrides)
    for name, value in pairs:
        _set_dotted(values, name, value)
    return parse(Recipe, values)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse` reads it back to an equal value."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)


def parse(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build dataclass `cls` from plain YAML values; unknown keys and wrong types raise `ConfigError`."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"Did you mean {prefix}{close[0]}?" if close else f"Known fields: {', '.join(sorted(known))}."
            raise ConfigError(f"{prefix}{key}", values[key], "there is no such field", hint)
    return cls(**{key: _coerce(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _read_yaml(path: str | Path) -> dict[str, Any]:
    data = None
    if str(path) in recipe_names():
        data = (resources.files("neuclip_scale") / "recipes" / f"{path}.yaml").read_bytes()
    elif Path(path).is_file():
        data = Path(path).read_bytes()
    if data is None:
        raise ConfigError(
            "recipe",
            str(path),
            "neither a packaged recipe nor a file",
            f"Packaged recipes: {', '.join(recipe_names())}; or give the path of a YAML file.",
        )
    try:
        values = yaml.load(data.decode("utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", str(path), f"not valid YAML in UTF-8 ({error})", "Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError("recipe", str(path), "not a mapping of sections", "Start from a packaged recipe.")
    return values


def _split_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(
            "override", text, "not of the form section.field=value", "Write train.num_steps=100, say."
        )
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(name.strip(), value, "not a YAML value", "Quote text with special characters.") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _set_dotted(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(name, value, f"{section} is not a section", "See `neuclip train --help`.")
    values[last] = value


def _coerce(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(name, value, "a section must be a mapping of fields", "Indent its fields below it.")
        return parse(hint, value, prefix=f"{name}.")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(name, value, "not one of the choices", f"Choose from {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (Ellipsis not in arguments and len(value) != len(arguments)):
            raise ConfigError(name, value, "wrong type or length", f"Expected {_describe(hint)}, as [a, b].")
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments else arguments
        return tuple(_coerce(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 (without a point) as text.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(name, value, f"has type {type(value).__name__}", f"Give {_describe(hint)}.")


def _describe(hint: Any) -> str:
    if isinstance(hint, (types.GenericAlias, typing._GenericAlias)):  # type: ignore[attr-defined]
        return str(hint).replace("typing.", "")
    words = {int: "a whole number", float: "a number", str: "text (quote it)", bool: "true or false"}
    return words.get(hint, str(hint))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def local_batch_size(recipe: Recipe, world_size: int) -> int:
    """Pairs per rank and step."""
    return recipe.train.global_batch_size // world_size


def micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """Pairs encoded at a time on one rank."""
    return recipe.train.micro_batch_size or local_batch_size(recipe, world_size)


def check_recipe(recipe: Recipe, world_size: int = 1) -> None:
    """Raise `ConfigError` for values or combinations that cannot be run on `world_size` ranks."""
    positive = {
        "data.num_streams": recipe.data.num_streams,
        "data.shuffle_window": recipe.data.shuffle_window,
        "data.prefetch_batches": recipe.data.prefetch_batches,
        "data.max_image_pixels": recipe.data.max_image_pixels,
        "train.global_batch_size": recipe.train.global_batch_size,
        "train.log_every_steps": recipe.train.log_every_steps,
        "objective.temperature_init": recipe.objective.temperature_init,
        "objective.temperature_min": recipe.objective.temperature_min,
        "objective.tile_size": recipe.objective.tile_size,
        "objective.npn.num_prototypes": recipe.objective.npn.num_prototypes,
        "objective.npn.updates_per_step": recipe.objective.npn.updates_per_step,
        "objective.npn.learning_rate": recipe.objective.npn.learning_rate,
        "optim.learning_rate": recipe.optim.learning_rate,
        "optim.eps": recipe.optim.eps,
        "checkpoint.keep": recipe.checkpoint.keep,
    }
    not_negative = {
        "data.num_workers": recipe.data.num_workers,
        "train.micro_batch_size": recipe.train.micro_batch_size,
        "train.num_steps": recipe.train.num_steps,
        "train.epochs": recipe.train.epochs,
        "train.max_grad_norm": recipe.train.max_grad_norm,
        "optim.weight_decay": recipe.optim.weight_decay,
        "optim.warmup_steps": recipe.optim.warmup_steps,
        "optim.temperature_learning_rate": recipe.optim.temperature_learning_rate,
        "objective.eps": recipe.objective.eps,
        "objective.rho": recipe.objective.rho,
        "objective.gamma_decay_epochs": recipe.objective.gamma_decay_epochs,
        "model.image_size": recipe.model.image_size,
        "objective.npn.restart_every": recipe.objective.npn.restart_every,
        "checkpoint.every_steps": recipe.checkpoint.every_steps,
        "evaluation.every_steps": recipe.evaluation.every_steps,
        "evaluation.normalizer_every_steps": recipe.evaluation.normalizer_every_steps,
        "evaluation.normalizer_reference": recipe.evaluation.normalizer_reference,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ConfigError(name, value, "must be above zero and finite", "Give a positive number.")
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(name, value, "must not be negative or infinite", "Give zero or a positive number.")
    for name, value in {
        "data.max_bad_fraction": recipe.data.max_bad_fraction,
        "model.dropout": recipe.model.dropout,
        "objective.gamma_min": recipe.objective.gamma_min,
    }.items():
        if not 0.0 <= value <= 1.0:
            raise ConfigError(name, value, "not a fraction", "Give a number from 0 to 1.")
    if recipe.model.dropout == 1.0:
        raise ConfigError("model.dropout", 1.0, "would drop everything", "Give a number below 1.")
    for i, beta in enumerate(recipe.optim.betas):
        if not 0.0 <= beta < 1.0:
            raise ConfigError(f"optim.betas[{i}]", beta, "not in [0, 1)", "AdamW's are near 0.9 and 0.98.")
    low, high = recipe.data.crop_scale
    if not 0.0 < low <= high <= 1.0:
        raise ConfigError("data.crop_scale", recipe.data.crop_scale, "not a range in (0, 1]", "Give [low, high].")
    _check_batch(recipe, world_size)
    _check_length_and_temperature(recipe)


def _check_batch(recipe: Recipe, world_size: int) -> None:
    batch, streams = recipe.train.global_batch_size, recipe.data.num_streams
    if batch < 2:
        raise ConfigError("train.global_batch_size", batch, "a contrastive batch needs negatives", "Give at least 2.")
    if streams % world_size:
        raise ConfigError(
            "data.num_streams",
            streams,
            f"not a multiple of the {world_size} ranks",
            f"Use {-(-streams // world_size) * world_size}, or a world size that divides {streams}.",
        )
    if batch % streams:
        lower = batch // streams * streams
        raise ConfigError(
            "train.global_batch_size",
            batch,
            f"not a multiple of data.num_streams = {streams}, so the streams cannot take equal shares",
            f"Use {f'{lower} or ' if lower else ''}{lower + streams}, or another data.num_streams; it is never rounded.",
        )
    local, micro = local_batch_size(recipe, world_size), recipe.train.micro_batch_size
    if micro > local:
        raise ConfigError(
            "train.micro_batch_size",
            micro,
            f"larger than the local batch of {local} ({batch} pairs over {world_size} ranks)",
            f"Use at most {local}, or 0 for the whole local batch.",
        )


def _check_length_and_temperature(recipe: Recipe) -> None:
    if not recipe.train.num_steps and not recipe.train.epochs:
        raise ConfigError("train.num_steps", 0, "the run has no length", "Give train.num_steps or train.epochs.")
    objective = recipe.objective
    if not objective.temperature_min <= objective.temperature_init <= objective.temperature_max:
        raise ConfigError(
            "objective.temperature_init",
            objective.temperature_init,
            f"outside [{objective.temperature_min}, {objective.temperature_max}]",
            "Move it inside, or move objective.temperature_min or temperature_max.",
        )
    if recipe.train.precision == "fp16" and recipe.engine.device == "cpu":
        raise ConfigError(
            "train.precision", "fp16", "fp16 needs a GPU's loss scaling", "Use bf16 or fp32 with engine.device=cpu."
        )
