"""DeepSpeed's configuration: ZeRO's entries from a file, everything else from the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError, Recipe, local_batch_size, micro_batch_size

FROM_THE_RECIPE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "zero_allow_untested_optimizer": "engine",
    "zero_force_ds_cpu_optimizer": "engine",
}
"""Entries of a DeepSpeed configuration that a ZeRO file may not hold, and who decides them."""
IN_ZERO3 = "ZeRO 3 gathers parameters by hooks in the middle of what would be compiled"
"""Why towers are not compiled under it."""


def read_settings(name: str) -> dict[str, Any]:
    """The ZeRO settings of a JSON file, or of the one called `name` in `ds_configs/`; raises `ConfigError`."""
    field = "engine.deepspeed.config"
    folders = [Path("ds_configs"), Path(__file__).parents[1] / "ds_configs"]
    found = [path for path in (Path(name), *(folder / f"{name}.json" for folder in folders)) if path.is_file()]
    if not found:
        known = sorted(path.stem for folder in folders[::-1] for path in folder.glob("*.json"))
        raise ConfigError(
            field, name, "no such file", f"Give a JSON file, or one of {', '.join(dict.fromkeys(known))}."
        )
    try:
        settings = json.loads(found[0].read_text("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConfigError(field, name, f"{found[0]} is no JSON object ({error})", "Mend it.") from error
    for key in settings.keys() & FROM_THE_RECIPE.keys():
        problem = f"{found[0]} sets {key}, which the recipe decides ({FROM_THE_RECIPE[key]})"
        raise ConfigError(field, name, problem, "Take it out of the file.")
    _check_zero(field, name, found[0], settings)
    return settings


def _check_zero(field: str, name: str, path: Path, settings: dict[str, Any]) -> None:
    """Raise `ConfigError` for a file without a stage: DeepSpeed takes no word elsewhere for one, and shards nothing."""
    zero: Any = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in range(4):
        problem = f"{path} names no ZeRO stage in zero_optimization, so nothing would be sharded"
        raise ConfigError(field, name, problem, 'Write {"zero_optimization": {"stage": N, ...}}, N from 0 to 3.')
    for key in ("offload_param", "offload_optimizer"):
        if not isinstance(zero.get(key, {}), dict):
            problem = f"{path} has {key} = {zero[key]!r} in zero_optimization"
            raise ConfigError(field, name, problem, 'Give {"device": "cpu"}, or leave it out.')


def zero_stage(settings: dict[str, Any]) -> int:
    """Which of ZeRO's stages they ask for."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def check_average(config: Recipe, settings: dict[str, Any]) -> None:
    """Raise `ConfigError` where an average of the weights could not take their place: of parameters that ZeRO 3 keeps
    whole on every rank, each rank's part is not what a forward pass reads.
    """
    kept = settings.get("zero_optimization", {}).get("stage3_param_persistence_threshold", 100_000)
    if zero_stage(settings) == 3 and config.optim.ema_decay > 0 and kept != 0:
        raise ConfigError(
            "optim.ema_decay",
            config.optim.ema_decay,
            f"ZeRO 3 keeps parameters of up to {kept} numbers whole (stage3_param_persistence_threshold, by default "
            "100000), which an average cannot take the place of",
            f"Set it to 0 in {config.engine.deepspeed.config}, as the packaged zero3 does.",
        )


def recipe_settings(config: Recipe) -> dict[str, Any]:
    """What the recipe decides, in DeepSpeed's words."""
    world_size = distributed.world_size()
    return {
        # What DeepSpeed calls a batch here is one backward pass: micro-batches are counted by the boundary alone.
        "train_micro_batch_size_per_gpu": micro_batch_size(config, world_size) or local_batch_size(config, world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
