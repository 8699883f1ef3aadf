"""`neuclip checkpoint` on the checkpoint of a real run, and which of its weights are taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from neuclip_scale import cli
from neuclip_scale.checkpoint import load_run_model
from neuclip_scale.config import load_recipe
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_synthetic_shards(folder / "shards", num_samples=16, samples_per_shard=8, image_size=40, seed=1)
    overrides = {
        "run_dir": str(folder / "run"), "data.train": str(folder / "shards"), "model.preset": "toy",
        "data.num_workers": 0, "train.global_batch_size": 8, "train.num_steps": 3, "checkpoint.every_steps": 0,
        "optim.ema_decay": 0.9, "optim.warmup_steps": 1, "evaluation.data": "", "objective.name": "fastclip-v3",
        "evaluation.normalizer_every_steps": 0, "engine.device": "cpu",
    }  # fmt: skip
    made = Trainer(load_recipe("demo", overrides))
    made.fit()
    return made


def test_inspect_lists_what_is_there(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "inspect", str(trainer.run_dir), "--json", str(tmp_path / "x.json")]) == 0
    assert "step_000000003: intact" in capsys.readouterr().out.replace("\n", "")
    found = json.loads((tmp_path / "x.json").read_bytes())
    N = sum(parameter.numel() for parameter in trainer.engine.module.parameters())
    assert (found["step"], found["samples_seen"], found["parameters"]) == (3, 24, N)
    assert (found["model"], found["objective"], found["world_size"]) == ("toy", "fastclip-v3", 1)
    kinds = found["bytes_by_kind"]
    assert [kinds[key] for key in ("value", "exp_avg", "exp_avg_sq", "ema")] == [4 * N] * 4
    assert found["normalizer_bytes"] >= 8 * 16


def test_a_damaged_one_is_named(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "step_000000003"
    shutil.copytree(trainer.run_dir / "checkpoints" / "step_000000003", copy)
    with open(copy / "rank_00000.pt", "r+b") as file:
        file.seek(1000)
        file.write(b"!")
    assert cli.main(["checkpoint", "inspect", str(copy)]) == 1
    assert "rank_00000.pt does not match its sha256" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_convert_writes_every_tensor(trainer: Trainer, tmp_path: Path, form: str) -> None:
    output = tmp_path / "out"
    command = ["checkpoint", "convert", str(trainer.run_dir), "--to", form, "--output", str(output)]
    assert cli.main(command) == 0
    expected = {
        f"{name}/{key}": tensor.clone()
        for name, tensors in trainer.engine.named_state()
        for key, tensor in tensors.items()
    }
    if form == "dcp":
        import torch.distributed.checkpoint as dcp

        read = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
        dcp.load(read, checkpoint_id=output, no_dist=True)
    else:
        from safetensors.torch import load_file

        read = load_file(output / "checkpoint.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in expected.items())
    assert cli.main(command) == 2, "never over what is there"


def test_which_weights_are_taken(trainer: Trainer) -> None:
    state = {name: {key: t.clone() for key, t in kept.items()} for name, kept in trainer.engine.named_state()}
    for weights, key in (("auto", "ema"), ("ema", "ema"), ("last", "value")):
        model, _ = load_run_model(trainer.run_dir, weights)  # type: ignore[arg-type]
        assert all(torch.equal(p, state[name][key]) for name, p in model.named_parameters())
    assert not torch.equal(state["text_projection"]["ema"], state["text_projection"]["value"])
    with trainer.engine.averaged():
        assert torch.equal(trainer.engine.module.text_projection, state["text_projection"]["ema"])
    assert torch.equal(trainer.engine.module.text_projection, state["text_projection"]["value"])
