"""Checkpoints against kills, full disks, damage and strangers' files."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from neuclip_scale.checkpoint import (
    CheckpointError,
    capture_rng,
    check_compatible,
    latest_checkpoint,
    load_all_ranks,
    load_checkpoint,
    load_parameters,
    load_run_model,
    restore_rng,
    save_checkpoint,
    saved_recipe,
    verify_checkpoint,
)
from neuclip_scale.checkpoint.layout import CHECKSUMS_FILE, FORMAT, measure
from neuclip_scale.config import ConfigError, Recipe, dump_recipe, load_recipe, parse
from neuclip_scale.engines import create_engine
from neuclip_scale.models.building import build_model


def content(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    shared = {
        "step": step,
        "model": {"weight": torch.full((1000,), float(step))},
        "recipe": dump_recipe(Recipe()),
    }
    return shared, {"rng": capture_rng(), "table": torch.arange(5.0)}


def save(folder: Path, step: int, keep: int = 2) -> Path:
    shared, per_rank = content(step)
    return save_checkpoint(folder, step, shared, per_rank, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        path = save(tmp_path, step)
    assert names(tmp_path) == ["latest", "step_000000002", "step_000000030"]
    assert (tmp_path / "latest").read_text() == "step_000000030\n"
    assert latest_checkpoint(tmp_path) == path
    shared, own = load_checkpoint(path, rank=0)
    assert shared["step"] == 30
    assert torch.equal(shared["model"]["weight"], torch.full((1000,), 30.0))
    assert own is not None
    assert torch.equal(own["table"], torch.arange(5.0))
    assert saved_recipe(shared) == Recipe()
    assert load_checkpoint(path, rank=1)[1] is None
    assert verify_checkpoint(path)["world_size"] == 1


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no intact checkpoint\. Give a run folder"):
        load_run_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"checksums\.json is missing\. Give a folder like"):
        load_checkpoint(tmp_path, rank=0)


def test_real_training_state_survives(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    shared = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 3, shared, {}, keep=1), rank=0)
    other = torch.nn.Linear(4, 3)
    other.load_state_dict(loaded["model"])
    again = torch.optim.AdamW(other.parameters())
    again.load_state_dict(loaded["optimizer"])
    assert again.param_groups[0]["betas"] == (0.9, 0.98)
    inputs = torch.randn(8, 4)
    for module, optim in ((model, optimizer), (other, again)):
        optim.zero_grad()
        module(inputs).square().mean().backward()
        optim.step()
    assert torch.equal(model.weight, other.weight)


def test_a_view_is_saved_without_the_tensor_behind_it(tmp_path: Path) -> None:
    table = torch.zeros(1_000_000)
    path = save_checkpoint(tmp_path, 1, {}, {"shard": table[:10]}, keep=1)
    assert (path / "rank_00000.pt").stat().st_size < 10_000


def test_saving_a_step_again_replaces_it_and_sets_later_ones_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    shared, per_rank = content(2)
    save_checkpoint(tmp_path, 2, {**shared, "again": True}, per_rank, keep=5)
    assert names(tmp_path) == ["latest", "step_000000001", "step_000000002", "superseded-step_000000003"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest, rank=0)[0]["again"] is True


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        save(tmp_path, 1, keep=0)


# Kills


def test_a_kill_in_the_middle_of_deleting_leaves_no_torn_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(folder: Path) -> None:
        (folder / "shared.pt").unlink()
        raise KeyboardInterrupt

    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3)
    for path in tmp_path.glob("step_*"):
        verify_checkpoint(path)
    save(tmp_path, 4)
    assert names(tmp_path) == ["latest", "step_000000003", "step_000000004"]


@pytest.mark.parametrize("state", ["replacing", "pruning", "writing"])
def test_traces_of_a_kill_are_cleared_by_the_next_save(tmp_path: Path, state: str) -> None:
    path = save(tmp_path, 1)
    hidden = {
        "replacing": ".old-step_000000001",
        "pruning": ".trash-step_000000000",
        "writing": ".tmp-step_000000009",
    }
    if state == "replacing":  # between the two renames, where only the old one is left
        path.rename(tmp_path / hidden[state])
        assert latest_checkpoint(tmp_path) == tmp_path / hidden[state]
    else:
        shutil.copytree(path, tmp_path / hidden[state])
        assert latest_checkpoint(tmp_path) == path
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_000000001", "step_000000002"]


# Damage


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("shared.pt", flip_a_byte, "does not match its sha256"),
        ("shared.pt", truncate, "bytes, not"),
        ("rank_00000.pt", Path.unlink, "is missing"),
        ("checksums.json", truncate, "is unreadable"),
        ("checksums.json", Path.unlink, "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any, problem: str
) -> None:
    intact, damaged = save(tmp_path, 1), save(tmp_path, 2)
    damage(damaged / name)
    assert latest_checkpoint(tmp_path) == intact
    assert str(damaged / name) in caplog.text
    assert problem in caplog.text
    assert damaged.is_dir()
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(damaged, rank=0)


def test_checksums_must_list_the_right_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / CHECKSUMS_FILE
    file.write_text(file.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(CheckpointError, match=r"does not list exactly .*rank_00001\.pt"):
        verify_checkpoint(path)
    file.write_text(file.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(CheckpointError, match="format 99"):
        verify_checkpoint(path)


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_payload_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "checkpoints", 1)
    file, checksums = path / "shared.pt", path / CHECKSUMS_FILE
    before = measure(file)
    torch.save({"model": Payload()}, file) if writer == "torch" else file.write_bytes(pickle.dumps(Payload()))
    text = checksums.read_text()  # whoever plants a payload mends the checksums
    for key, value in measure(file).items():
        text = text.replace(str(before[key]), str(value))
    checksums.write_text(text)
    with pytest.raises(CheckpointError, match=r"shared\.pt is refused") as caught:
        load_checkpoint(path, rank=0)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(1.0), r"shared\.pt\['a'\]\[1\] is a numpy\.float64"),
        (Payload(), r"\.Payload\. A checkpoint holds"),
        ({(1, 2): 3}, r"has the key \(1, 2\)"),
    ],
)
def test_content_that_could_not_be_read_back_is_refused_when_saving(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 1, {"a": [0, value]}, {}, keep=1)
    assert names(tmp_path) == []


# Disks


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the file size, set in a process of its own, fails the write part of the way."""
    save(tmp_path, 1)
    script = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from neuclip_scale.checkpoint import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
        "save_checkpoint(Path(sys.argv[1]), 2, {'weight': torch.zeros(100_000)}, {}, keep=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CheckpointError: cannot write checkpoint" in done.stderr
    assert "File too large. Free space; earlier checkpoints are intact." in done.stderr
    assert names(tmp_path) == ["latest", "step_000000001"]
    verify_checkpoint(tmp_path / "step_000000001")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tiny file system needs root; test_full_disk covers a failing write without it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_file_system(tiny_disk: Path) -> None:
    save(tiny_disk, 1)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free space; earlier checkpoints are intact"):
        save_checkpoint(tiny_disk, 2, {"weight": torch.zeros(100_000)}, {}, keep=1)
    assert names(tiny_disk) == ["latest", "step_000000001"]
    assert save(tiny_disk, 3, keep=1) == latest_checkpoint(tiny_disk)


def test_read_only_file_system(tiny_disk: Path) -> None:
    save(tiny_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*Make the folder writable"):
        save(tiny_disk, 2)
    assert latest_checkpoint(tiny_disk) == tiny_disk / "step_000000001"


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(CheckpointError, match="choose another run_dir"):
        save(tmp_path / "checkpoints", 1)


# Random numbers, compatibility, ranks


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.normal()), float(torch.rand(1))


def test_restored_generators_draw_the_same(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a cached second value in the state
    np.random.normal()
    path = save_checkpoint(tmp_path, 1, {}, capture_rng(), keep=1)
    first = [draws() for _ in range(3)]
    own = load_checkpoint(path, rank=0)[1]
    assert own is not None
    restore_rng(own)
    assert [draws() for _ in range(3)] == first


def test_another_model_or_objective_is_refused() -> None:
    saved = Recipe()
    changes = {"model": {"preset": "demo", "compile": True}, "objective": {"npn": {"num_prototypes": 8}}}
    with pytest.raises(ConfigError) as caught:
        check_compatible(saved, parse(Recipe, changes))
    assert "model.preset ('ViT-B-32' there, 'demo' here)" in str(caught.value)
    assert "objective.npn.num_prototypes (4096 there, 8 here)" in str(caught.value)
    assert "compile" not in str(caught.value)
    check_compatible(saved, parse(Recipe, {"objective": {"tile_size": 7}, "train": {"num_steps": 5}}))
    check_compatible(saved, parse(Recipe, {"objective": {"npn": {"cuda_graphs": True}}}))
    with pytest.raises(ConfigError, match=r"optim\.name \('adamw' there, 'lion' here\)"):
        check_compatible(saved, parse(Recipe, {"optim": {"name": "lion"}}))  # would take AdamW's moments for its own
    check_compatible(saved, parse(Recipe, {"optim": {"learning_rate": 1e-4, "betas": [0.8, 0.9]}}))


def save_on_two_ranks(rank: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    bad = {"bad": object()} if rank == 1 else {}
    with pytest.raises(CheckpointError, match=r"rank 1: rank_00001\.pt\['bad'\] is a builtins\.object"):
        save_checkpoint(folder / "checkpoints", 6, {}, bad, keep=1)
    assert latest_checkpoint(folder / "checkpoints") is None
    torch.distributed.barrier()
    save_checkpoint(folder / "checkpoints", 7, {"from": rank}, {"rank": rank}, keep=1)
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_save_one_checkpoint_and_fail_together(tmp_path: Path) -> None:
    mp.start_processes(save_on_two_ranks, args=(tmp_path,), nprocs=2, start_method="forkserver")
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    assert [load_checkpoint(path, rank) for rank in (0, 1, 2)] == [
        ({"from": 0}, {"rank": 0}),
        ({"from": 0}, {"rank": 1}),
        ({"from": 0}, None),
    ]
    assert load_all_ranks(path) == ({"from": 0}, [{"rank": 0}, {"rank": 1}])


def test_a_checkpoint_of_another_model_lists_the_differences(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    engine = create_engine(build_model(recipe), recipe, torch.device("cpu"))
    state = dict(engine.named_state())
    del state["ln_final.weight"]
    state["more"] = {"value": torch.zeros(2)}
    state["text_projection"] = {"value": torch.zeros(3, 4)}
    before = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    listed = (
        r"1 missing: ln_final\.weight\. 1 unexpected: more\. 1 of another shape: text_projection \[3, 4\] instead of"
    )
    with pytest.raises(CheckpointError, match=listed):
        load_parameters(engine, [{"parameters": state}])
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.module.state_dict().items())


def test_every_so_many_stay_for_good(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save_checkpoint(tmp_path, step, {"step": step}, {}, keep=1, keep_every=20)
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == [f"step_{step:09d}" for step in (20, 40, 60)]
    assert load_all_ranks(tmp_path / "step_000000020")[0] == {"step": 20}


def test_the_model_of_a_run_folder(tmp_path: Path) -> None:
    recipe = load_recipe("demo", {"model.compile": True})
    model = build_model(recipe)
    shared = {"buffers": dict(model.named_buffers()), "recipe": dump_recipe(recipe)}
    own = {"parameters": {name: {"value": value} for name, value in model.named_parameters()}}
    path = save_checkpoint(tmp_path / "checkpoints", 5, shared, own, keep=1)
    for given in (tmp_path, path):
        loaded, read = load_run_model(given)
        assert read == recipe
        assert not loaded.training
        assert not loaded._compiled, "a few batches are not worth a program"
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
