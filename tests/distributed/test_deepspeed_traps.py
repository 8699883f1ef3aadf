"""DeepSpeed goes wrong without a word in some places: each cure is taken away, and the trap must snap.

A trap that no longer does is a cure that can go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from engine_helpers import Overrides, overrides, train, zero
from ranks import run_ranks
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from neuclip_scale import distributed, load_recipe
from neuclip_scale.data.batch import Batch
from neuclip_scale.engines import deepspeed
from neuclip_scale.engines.deepspeed import DeepSpeedEngine
from neuclip_scale.models.building import create_model
from neuclip_scale.models.clip import CLIP, CLIPOutput, Towers
from neuclip_scale.models.presets import get_preset
from neuclip_scale.trainer import Trainer

pytestmark = pytest.mark.distributed

MICRO: Overrides = {"train.micro_batch_size": 3}
CLIPPED: Overrides = {**MICRO, "train.max_grad_norm": 0.5}
BF16: Overrides = {"train.precision": "bf16"}


def without_boundaries() -> AbstractContextManager[Any]:
    """Every backward pass is taken for the last one."""
    return patch.object(DeepSpeedEngine, "micro_step", lambda self, *, is_last: nullcontext())


def kept_graphs_without_a_word() -> AbstractContextManager[Any]:
    """Only a forward pass tells ZeRO 3 that a backward pass was not the step's first."""

    def micro_step(self: DeepSpeedEngine, *, is_last: bool) -> AbstractContextManager[Any]:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    return patch.object(DeepSpeedEngine, "micro_step", micro_step)


def scalars_in_the_last_pass_only() -> AbstractContextManager[Any]:
    """logit_scale has no part in the backward passes before the last."""

    def backward(
        self: DeepSpeedEngine, output: CLIPOutput, image: Tensor, text: Tensor, scale: Tensor | None, bias: None = None
    ) -> None:
        total = (output.image_features * image).sum() + (output.text_features * text).sum()
        if scale is not None:
            total = total + (output.logit_scale * scale).sum()
        self.backward_scalar(total * distributed.world_size())

    return patch.object(DeepSpeedEngine, "backward", backward)


@contextmanager
def one_tower_a_pass() -> Iterator[None]:
    """The towers are run and back-propagated one after the other: the text tower has no part in the first pass."""
    encode, batches = DeepSpeedEngine.encode, []

    def noted(self: DeepSpeedEngine, batch: Batch, towers: Towers = "both") -> CLIPOutput:
        batches.append(batch)
        return encode(self, batch, towers)

    def backward(
        self: DeepSpeedEngine, output: CLIPOutput, image: Tensor, text: Tensor, scale: Tensor, bias: None = None
    ) -> None:
        with self.micro_step(is_last=False):
            output = encode(self, batches[-1])
            total = (output.image_features * image).sum() + (output.logit_scale * scale).sum()
            self.backward_scalar(total * distributed.world_size())
        with self.micro_step(is_last=True):
            output = encode(self, batches[-1])
            self.backward_scalar((output.text_features * text).sum() * distributed.world_size())

    with patch.object(DeepSpeedEngine, "encode", noted), patch.object(DeepSpeedEngine, "backward", backward):
        yield


def with_settings(change: Callable[[dict[str, Any]], dict[str, Any]]) -> AbstractContextManager[Any]:
    original = deepspeed.recipe_settings
    return patch.object(deepspeed, "recipe_settings", lambda config: change(original(config)))


def clipping_left_to_the_caller() -> AbstractContextManager[Any]:
    """Gradients under ZeRO are DeepSpeed's own: torch's clipping would not see them."""
    return with_settings(lambda settings: settings | {"gradient_clipping": 0.0})


def its_own_bf16() -> AbstractContextManager[Any]:
    """DeepSpeed's bf16 holds the parameters themselves in bf16, logit_scale too."""
    return with_settings(lambda settings: settings | {"torch_autocast": {"enabled": False}, "bf16": {"enabled": True}})


@contextmanager
def logit_scale_without_a_dimension() -> Iterator[None]:
    original = CLIP.__init__

    def init(self: CLIP, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.logit_scale = nn.Parameter(self.logit_scale.detach().reshape(()))

    with patch.object(CLIP, "__init__", init):
        yield


@dataclass(frozen=True)
class Trap:
    """A cure taken away, the ZeRO file and recipe where that shows, and the error it shows by, if by any."""

    without_cure: Callable[[], AbstractContextManager[Any]]
    zero: str
    options: Overrides
    tolerance: float = 2e-5
    error: str = ""


TRAPS = {
    "lost chunks": Trap(without_boundaries, "zero2", MICRO),
    "kept graphs": Trap(kept_graphs_without_a_word, "zero3", {**MICRO, "train.kept_micro_batches": 2}),
    "stale gradient of a scalar": Trap(scalars_in_the_last_pass_only, "zero3", MICRO),
    "stale gradient of a tower": Trap(one_tower_a_pass, "zero3", {}),
    "clipping": Trap(clipping_left_to_the_caller, "zero2", CLIPPED),
    "0-dim parameter": Trap(logit_scale_without_a_dimension, "zero2", {}, error="cannot be 0"),
    "bf16, stage 0": Trap(its_own_bf16, "zero0", BF16, tolerance=1e-3),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("lost chunks", "0-dim parameter") else pytest.mark.long)
        for name in TRAPS
    ],
)
def test_a_trap_snaps_without_its_cure(folder: str, name: str) -> None:
    trap = TRAPS[name]
    expected = train(folder, f"single {name}", trap.options | {"train.precision": "fp32"})
    engine = zero(trap.zero) | trap.options
    cured, _ = run_ranks(2, train, folder, f"cured {name}", engine)
    assert largest_difference(cured, expected) < trap.tolerance
    if trap.error:
        with pytest.raises(ProcessRaisedException, match=trap.error):
            run_ranks(2, train_without_cure, folder, name, engine)
    else:
        trapped, _ = run_ranks(2, train_without_cure, folder, name, engine)
        assert largest_difference(trapped, expected) > 5 * trap.tolerance


def train_without_cure(folder: str, name: str, engine: Overrides) -> dict[str, Any]:
    with TRAPS[name].without_cure():
        return train(folder, f"trapped {name}", engine)


def largest_difference(result: dict[str, Any], expected: dict[str, Any]) -> float:
    """Of any weight."""
    pairs = ((result["state"][name]["value"], kept["value"]) for name, kept in expected["state"].items())
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


def test_small_parameters_travel_with_the_others(folder: str) -> None:
    """DeepSpeed's own threshold keeps them whole, and gathers each by a call of its own after every update."""
    file = Path(folder) / "threshold.json"
    settings = json.loads((Path(__file__).parents[2] / "ds_configs/zero3.json").read_bytes())
    assert settings["zero_optimization"].pop("stage3_param_persistence_threshold") == 0
    file.write_text(json.dumps(settings))
    parameters = sum(1 for _ in create_model(get_preset("toy")).parameters())
    cured, _ = run_ranks(2, gathers_of_a_step, folder, "zero3")
    trapped, _ = run_ranks(2, gathers_of_a_step, folder, str(file))
    assert cured < parameters / 3
    assert trapped > parameters / 2


def gathers_of_a_step(folder: str, config: str) -> int:
    """All-gathers of ZeRO 3's third step, which knows from the first what it will want."""
    calls: list[object] = []
    gather = dist.all_gather_into_tensor

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(None)
        return gather(*given, **options)

    with patch.object(dist, "all_gather_into_tensor", counted):
        trainer = Trainer(load_recipe("demo", overrides(folder, f"gathers {Path(config).stem}", zero(config))))
        batches = iter(trainer.loader)
        for _ in range(3):
            calls.clear()
            trainer.train_step(next(batches).batch)
    return len(calls)
