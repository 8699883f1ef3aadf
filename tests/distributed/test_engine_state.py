"""What engines keep and how: steps that go on elsewhere, bytes on each rank, optimizers, compiled towers."""

from __future__ import annotations

import functools
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine_helpers import ENGINES, FSDP2, Overrides, assert_same, overrides, train, zero
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError, load_recipe
from neuclip_scale.data.batch import Batch
from neuclip_scale.engines import Engine, create_engine
from neuclip_scale.engines.base import like, local_part
from neuclip_scale.models.building import plan_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.optim import set_learning_rates
from neuclip_scale.planning import plan_memory

pytestmark = pytest.mark.distributed


def step_on_random_gradients(overrides: Overrides) -> dict[str, torch.Tensor]:
    """Weights before and after three steps on gradients of full rank, the same for every engine."""
    config = load_recipe("demo", {"model.preset": "toy", "optim.learning_rate": 1e-2, **overrides})
    torch.manual_seed(0)
    engine = create_engine(plan_model(config), config, distributed.initialize("cpu"))
    set_learning_rates(engine.optimizer, 1.0, constant_temperature=False, temperature_dropped=False)
    state = {f"{name} before": kept["value"].clone() for name, kept in engine.named_state()}
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in engine.module.parameters():
            whole = torch.randn(parameter.shape, generator=draw)
            parameter.grad = like(parameter, whole)
        engine.step(0.0)
    return state | {name: kept["value"].clone() for name, kept in engine.named_state()}


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # lamb sums 3 million squares in fp32, muon multiplies in bf16
    [
        ("lamb", 5e-4),
        pytest.param("lion", 1e-5, marks=pytest.mark.long),
        pytest.param("muon", 2e-2, marks=pytest.mark.long),
        ("sgd", 1e-5),
        ("adamw", 1e-5),
    ],
)
def test_optimizers_see_whole_tensors_on_shards(name: str, tolerance: float) -> None:
    """lamb looks at norms and muon at matrices: a rank that took its own part of either would step elsewhere."""
    (expected,) = run_ranks(1, step_on_random_gradients, {"optim.name": name})
    for after in run_ranks(2, step_on_random_gradients, {"optim.name": name, **FSDP2}):
        for parameter in (each for each in after if not each.endswith(" before")):
            before = expected[f"{parameter} before"]
            assert torch.equal(after[f"{parameter} before"], before), parameter
            moved, error = expected[parameter] - before, after[parameter] - expected[parameter]
            assert moved.norm() > 0
            assert error.norm() <= tolerance * moved.norm(), parameter


def refused_optimizer(overrides: Overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        step_on_random_gradients(overrides)
    return str(caught.value)


def test_an_optimizer_that_torch_cannot_shard_is_refused_before_it_trains() -> None:
    for told in run_ranks(2, refused_optimizer, {"optim.name": "mars", **FSDP2}):
        assert "optim.name = 'mars': torch does not do to sharded tensors" in told
        assert "engine.name=ddp" in told


def resume_on_random_gradients(overrides: Overrides) -> bool:
    """Whether a third step is the same after the state has gone to another engine."""
    config = load_recipe("demo", {"model.preset": "toy", "optim.learning_rate": 1e-2, **overrides})
    device, draw = distributed.initialize("cpu"), torch.Generator().manual_seed(1)

    def started() -> Engine:
        torch.manual_seed(0)
        engine = create_engine(plan_model(config), config, device)
        set_learning_rates(engine.optimizer, 1.0, constant_temperature=False, temperature_dropped=False)
        return engine

    def step(*engines: Engine) -> None:
        for number, parameter in enumerate(engines[0].module.parameters()):
            whole = torch.randn(parameter.shape, generator=draw)
            for engine in engines:
                own = list(engine.module.parameters())[number]
                own.grad = like(own, whole)
        for engine in engines:
            engine.step(0.0)

    first, second = started(), started()
    step(first)
    step(first)
    state = {name: {key: tensor.clone() for key, tensor in kept.items()} for name, kept in first.named_state()}
    second.load_named_state(lambda name: dict(state[name]))
    second.load_scalar_state(first.scalar_state())
    step(first, second)
    pairs = zip(first.named_state(), second.named_state(), strict=True)
    return all(torch.equal(one["value"], other["value"]) for (_, one), (_, other) in pairs)


def test_factored_moments_come_back_to_shards() -> None:
    """adafactorbv keeps means of rows and columns, whose shapes are no parameter's."""
    assert run_ranks(2, resume_on_random_gradients, {"optim.name": "adafactorbv", **FSDP2}) == [True, True]


def evaluate_between_steps(overrides: Overrides) -> dict[str, torch.Tensor]:
    """Weights, their average and features under it, where evaluations of the average lie between steps."""
    config = load_recipe("demo", {"model.preset": "toy", "optim.learning_rate": 1e-2, "optim.eps": 1e-3, **overrides})
    torch.manual_seed(0)
    engine = create_engine(plan_model(config), config, distributed.initialize("cpu"))
    set_learning_rates(engine.optimizer, 1.0, constant_temperature=False, temperature_dropped=False)
    engine.start_average(0.5)
    draw, size, model = torch.Generator().manual_seed(1), 4, engine.module
    images = torch.randn(size, 3, model.image_size, model.image_size, generator=draw)
    tokens = torch.randint(1, 100, (size, model.context_length), generator=draw)
    batch = Batch(images, tokens, torch.arange(size), tuple(map(str, range(size))))
    found = {}
    for step in (1, 2, 3):
        gradients = torch.randn(2, size, model.embed_dim, generator=draw) / distributed.world_size()
        with engine.micro_step(is_last=True):
            engine.backward(engine.encode(batch), *gradients, torch.ones(1) / distributed.world_size())
        engine.step(0.0)
        engine.update_average(step)
        model.eval()
        with torch.no_grad(), engine.averaged():
            found[f"features {step}"] = engine.encode(batch).image_features.clone()
        model.train()
        found |= {
            f"{step} {name} {key}": each.clone() for name, kept in engine.named_state() for key, each in kept.items()
        }
    return found


@pytest.mark.parametrize("reshards", [False, pytest.param(True, marks=pytest.mark.long)])
def test_evaluations_of_the_average_leave_nothing_behind(reshards: bool) -> None:
    """FSDP2 may keep gathered parameters: the average's must be gone when the weights' are back."""
    (expected,) = run_ranks(1, evaluate_between_steps, {})
    sharded = FSDP2 | {"engine.fsdp.reshard_after_forward": reshards}
    for found in run_ranks(2, evaluate_between_steps, sharded):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5, msg=name)
    assert not torch.equal(expected["features 3"], expected["features 2"])


def train_compiled(folder: str, run: str, more: Overrides) -> dict[str, Any]:
    # Traced and differentiated by torch.compile; generating C++ as well would take a minute.
    whole = CLIP.compile_towers
    CLIP.compile_towers = functools.partialmethod(whole, backend="aot_eager")  # type: ignore[assignment, method-assign]
    try:
        return train(folder, run, more | {"model.compile": True})
    finally:
        CLIP.compile_towers = whole  # type: ignore[method-assign]


COMPILED: Overrides = {"model.image_layers": 1, "train.micro_batch_size": 3, "model.grad_checkpointing": True}


@pytest.fixture(scope="module")
def not_compiled(folder: str) -> dict[str, Any]:
    return train(folder, "plain", COMPILED | {"model.pack_captions": False})


@pytest.mark.parametrize(
    "label",
    [
        "ddp, 2 ranks",
        pytest.param("fsdp2, 1 rank", marks=pytest.mark.long),
        pytest.param("zero2, 1 rank", marks=pytest.mark.long),
    ],
)
def test_compiled_towers_make_the_same_updates(folder: str, not_compiled: dict[str, Any], label: str) -> None:
    """FSDP2's hooks lie around what is compiled on one rank as on several, each of which would compile for itself. Its
    last micro-batch is another size, which takes programs of its own."""
    world_size, engine = ENGINES[label]
    more = COMPILED | engine | ({"train.micro_batch_size": 10} if label.startswith("fsdp2") else {})
    (result, *_) = run_ranks(world_size, train_compiled, folder, f"compiled {label}", more)
    assert_same(result, not_compiled, weights=2e-5, losses=1e-5)


def test_what_a_backend_cannot_compile_says_so(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.compile.*ZeRO 3 gathers parameters"):
        train(folder, "never", {"model.compile": True, **zero("zero3")})


def test_steps_counted_by_group_travel(folder: str) -> None:
    """lamb counts them there, for its bias correction; and ZeRO refuses an optimizer it would feed slices."""
    more = {"optim.name": "lamb", "model.preset": "toy", "checkpoint.every_steps": 2, "train.num_steps": 4}
    expected = train(folder, "lamb", more)
    shutil.rmtree(Path(folder, "lamb", "checkpoints", "step_000000004"))
    again = train(folder, "lamb", more)
    for name, state in expected["state"].items():
        assert all(torch.equal(tensor, again["state"][name][key]) for key, tensor in state.items()), name
    with pytest.raises(ConfigError, match="norms would be wrong"):
        train(folder, "never", more | zero("zero2"))


CHAIN = ["ddp, 2 ranks", "zero3, 2 ranks", "fsdp2, 2 x 2 ranks", "zero1, 2 ranks", "zero2, 4 ranks", "fsdp2, 1 rank"]


def train_until(folder: str, run: str, more: Overrides, last: int) -> dict[str, Any]:
    """`train`, which gets SIGTERM in step `last`, where a checkpoint is due, and so ends after it."""
    from neuclip_scale.trainer import Trainer

    whole = Trainer.train_step

    def train_step(self: Trainer, *given: Any) -> Any:
        if self.run_state.launched + 1 == last:
            signal.raise_signal(signal.SIGTERM)
        return whole(self, *given)

    with patch.object(Trainer, "train_step", train_step):
        return train(folder, run, more)


def test_a_run_goes_on_under_another_engine_and_number_of_ranks(folder: str) -> None:
    """Six steps, each under another engine, end where one process ends; moments and step counts travel too."""
    more = {"train.num_steps": len(CHAIN), "checkpoint.keep": 20, "checkpoint.every_steps": 1}
    more |= {"train.micro_batch_size": 6}
    expected = train(folder, "unbroken", more)
    for number, label in enumerate(CHAIN, start=1):
        world_size, engine = ENGINES[label]
        (result, *_) = run_ranks(world_size, train_until, folder, "chain", more | engine, number)
        saved = sorted(path.name for path in Path(folder, "chain", "checkpoints").glob("step_*"))
        assert saved == [f"step_{step:09d}" for step in range(1, number + 1)]
    assert_same(result, expected, weights=2e-5, losses=1e-5)


@pytest.mark.parametrize(
    "label", ["fsdp2, 2 ranks", pytest.param("zero1, 2 ranks", marks=pytest.mark.long), "zero3, 2 ranks"]
)
def test_the_same_ranks_go_on_bit_for_bit(folder: str, label: str) -> None:
    world_size, engine = ENGINES[label]
    more = engine | {"train.num_steps": 4, "checkpoint.every_steps": 2, "model.dropout": 0.1}
    first = run_ranks(world_size, train, folder, f"bits {label}", more)
    shutil.rmtree(Path(folder, f"bits {label}", "checkpoints", "step_000000004"))
    again = run_ranks(world_size, train, folder, f"bits {label}", more)
    for name, state in first[0]["state"].items():
        assert state, name
        assert all(torch.equal(tensor, again[0]["state"][name][key]) for key, tensor in state.items()), name


def gradient_bytes(engine: Any) -> int:
    """What this rank keeps of the gradient between backward pass and step; ZeRO has its parts in its own hands."""
    optimizer = engine.optimizer
    kept = [local_part(p.grad) for p in engine.module.parameters() if p.grad is not None]
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)  # ZeRO 3
    for tensors in getattr(optimizer, "averaged_gradients", {}).values() if flat is None else ():  # ZeRO 1 and 2
        kept += tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(tensor.nbytes for tensor in kept) + (0 if flat is None else flat.nbytes)


def held_bytes(folder: str, run: str, more: Overrides) -> tuple[int, int, int]:
    """Bytes of parameters, gradients, and master copies and moments on this rank, the second before a step."""
    from neuclip_scale.trainer import Trainer

    trainer = Trainer(load_recipe("demo", overrides(folder, run, more | {"train.num_steps": 1})))
    engine: Any = trainer.engine
    step, gradients = engine.step, []

    def measured(max_grad_norm: float) -> Any:
        gradients.append(gradient_bytes(engine))
        return step(max_grad_norm)

    engine.step = measured
    trainer.fit()
    parameters = [getattr(p, "ds_tensor", None) for p in engine.module.parameters()]
    parameters = [local_part(p) if part is None else part for p, part in zip(engine.module.parameters(), parameters)]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    kept = [local_part(t) for state in inner.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    masters = [part for part in inner.state if not any(part is p for p in engine.module.parameters())]
    return sum(t.nbytes for t in parameters), gradients[0], sum(t.nbytes for t in kept + masters)


@pytest.mark.parametrize("label", ["fsdp2, 2 ranks", "zero1, 2 ranks", "zero2, 4 ranks", "zero3, 2 ranks"])
def test_a_rank_holds_its_share(folder: str, label: str) -> None:
    """ZeRO's formula (arXiv 1910.02054) in fp32, as `neuclip plan` has it, within 2 % for what does not divide."""
    world_size, engine = ENGINES[label]
    planned = plan_memory(load_recipe("demo", overrides(folder, "plan", engine)), world_size)
    items = {item.name: item.device for item in planned.items}
    for parameters, gradients, optimizer in run_ranks(world_size, held_bytes, folder, f"bytes {label}", engine):
        assert parameters == pytest.approx(items["parameters"], rel=0.02)
        assert optimizer == pytest.approx(items["optimizer"], rel=0.02)
        assert gradients == pytest.approx(items["gradients"], rel=0.02)


def test_a_zero_file_may_not_decide_what_the_recipe_decides(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for text, problem in [
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}', "gradient_clipping.*train.max_grad_norm"),
        ('{"bf16": {"enabled": true}}', "bf16.*train.precision"),
        ("[]", "no JSON object"),
        ('{"stage": 3, "overlap_comm": true}', "names no ZeRO stage in zero_optimization.*Write"),
        ('{"zero_optimization": {"stage": "3"}}', "names no ZeRO stage"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": null}}', "offload_optimizer = None.*leave it out"),
        ('{"zero_optimization": {"stage": 3, "overlap_com": true}}', r"mine\.json.*overlap_com"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            train(folder, "never", zero(str(path)))
    with pytest.raises(ConfigError, match="zero2_offload"):
        train(folder, "never", zero("zero7"))
    with pytest.raises(ConfigError, match=r"engine\.fsdp\.replicas"):
        train(folder, "never", FSDP2 | {"engine.fsdp.replicas": 3})


def test_an_average_needs_parameters_in_parts(folder: str, tmp_path: Path) -> None:
    """ZeRO 3 reads small parameters where it keeps them whole, unless the file says otherwise."""
    path = tmp_path / "mine.json"
    averaging = {"optim.ema_decay": 0.9}
    path.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(ConfigError, match=r"optim\.ema_decay = 0\.9: ZeRO 3 keeps .*100000.* Set it to 0 in .*mine"):
        train(folder, "never", zero(str(path)) | averaging)
