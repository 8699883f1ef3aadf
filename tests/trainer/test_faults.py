"""Broken training data is counted and passed over; too much of it, or a loss that is no number, ends the run."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trainer_helpers import arguments, logged_steps, neuclip, recipe, start_ranks

from neuclip_scale.data.shards import index_shard, write_shard
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.trainer import NonFiniteLossError, Trainer


def bomb() -> bytes:
    """Under a kilobyte that claims to be a PNG of 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 40), 60).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


BROKEN: dict[str, dict[str, Any]] = {
    "torn": {"jpg": jpeg()[:-300], "txt": "a torn picture"},
    "latin": {"jpg": jpeg(), "txt": "caf\xe9".encode("latin-1")},
    "bomb": {"png": bomb(), "txt": "a bomb"},
}
REASONS = {"torn": "truncated", "latin": "caption is not UTF-8", "bomb": "DecompressionBomb"}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good pairs with three bad ones among them, one shard cut off and one empty."""
    folder = tmp_path_factory.mktemp("faulty")
    write_synthetic_shards(folder, num_samples=45, samples_per_shard=15, image_size=40, seed=2)
    last = folder / "00002.tar"
    last.write_bytes(last.read_bytes()[: index_shard(last).members(10)["jpg"].offset + 10])
    write_shard(folder / "00003.tar", [{"__key__": key, **members} for key, members in BROKEN.items()])
    write_shard(folder / "00004.tar", [])
    return folder


def test_bad_samples_are_counted_and_listed(faulty: Path, runs: Path) -> None:
    options = {"data.num_workers": 1, "data.max_bad_fraction": 0.2}
    status, text = neuclip(arguments(faulty, runs / "run", **options), runs / "output.txt")
    assert status == 0, text
    rows = [json.loads(line) for line in (runs / "run" / "skipped" / "rank_00000.jsonl").read_text().splitlines()]
    faults = {Path(row["shard"]).name: row["reason"] for row in rows if row["key"] is None}
    assert faults.keys() == {"00002.tar", "00004.tar"}
    assert "cut off" in faults["00002.tar"]
    assert "holds no sample" in faults["00004.tar"]
    samples = [row for row in rows if row["key"] is not None]
    assert {row["key"] for row in samples} == BROKEN.keys()
    for row in samples:
        assert row["shard"] == str(faulty / "00003.tar")
        assert REASONS[row["key"]] in row["reason"]

    summary = json.loads((runs / "run" / "summary.json").read_text("utf-8"))
    assert summary["dataset_size"] == 43
    assert summary["samples_skipped"] == len(samples)
    assert summary["samples_read"] == summary["samples_seen"] + len(samples)
    assert summary["faulty_shards"] == 2
    assert "2 damaged shard(s), listed in" in text
    assert "00002.tar: " in text
    assert logged_steps(runs / "run")[-1]["num_skipped"] == len(samples)


def test_too_many_bad_samples_end_the_run(faulty: Path, runs: Path) -> None:
    status, text = neuclip(arguments(faulty, runs / "run"), runs / "output.txt")
    assert status == 1
    first, *listed = [
        line for line in text.splitlines() if not line.startswith(("INFO ", "2 damaged shard(s)", "warning: "))
    ]
    assert first.startswith("error: 3 of ")
    assert "more than data.max_bad_fraction = 0.02" in first
    assert "Traceback" not in text
    assert all(any(f"00003.tar {key}: " in line for line in listed) for key in BROKEN)


# ---------------------------------------------------------------------------------------------------------------------


class PoisonedTrainer(Trainer):
    """Meets a NaN in the weights of this rank before step 3."""

    poisoned_rank = 0

    def train_step(self, *given: Any) -> Any:
        if self.run_state.launched == 2 and self.rank == self.poisoned_rank:
            with torch.no_grad():
                self.engine.module.get_parameter("visual.conv1.weight")[0, 0, 0, 0] = torch.nan
        return super().train_step(*given)


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*step_*"))


@pytest.mark.parametrize("objective", ["openclip", "fastclip-v3", "neuclip"])
def test_a_loss_that_is_no_number_ends_the_run(shards: Path, runs: Path, objective: str) -> None:
    options = {"objective.name": objective, "checkpoint.every_steps": 1, "train.global_batch_size": 4}
    config = recipe(shards, runs / "run", **options, **{"checkpoint.keep": 9})
    with pytest.raises(
        NonFiniteLossError, match=r"step 3: loss = nan; features are not finite on rank 0 \(uids "
    ) as caught:
        PoisonedTrainer(config).fit()
    assert checkpoints(runs / "run") == ["step_000000001", "step_000000002"]
    assert [line["step"] for line in logged_steps(runs / "run")] == [1, 2]
    report = json.loads((runs / "run" / "nonfinite_step_000000003_rank_00000.json").read_text("utf-8"))
    assert (report["step"], report["rank"], report["features_finite"]) == (3, 0, False)
    assert len(report["uids"]) == 4
    assert all(uid in str(caught.value) for uid in report["uids"][:3])


def test_a_gradient_that_is_no_number_ends_the_run(shards: Path, runs: Path) -> None:
    """The loss is still finite, but the weights are not any more: they must not reach a checkpoint."""
    trainer = Trainer(recipe(shards, runs / "run", **{"checkpoint.every_steps": 1}))
    trainer.engine.module.text_projection.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(
        NonFiniteLossError, match="step 1: grad_norm = nan; features are finite, the backward pass is not"
    ):
        trainer.fit()
    assert checkpoints(runs / "run") == []


def train_poisoned(config: Any) -> int:
    PoisonedTrainer.poisoned_rank = 1
    with pytest.raises(NonFiniteLossError) as caught:
        PoisonedTrainer(config).fit()
    print(caught.value)
    return 0


@pytest.mark.distributed
def test_every_rank_names_the_rank_with_the_bad_features(shards: Path, runs: Path) -> None:
    ranks = start_ranks(2, train_poisoned, (recipe(shards, runs / "run"),), runs / "output")
    for rank in ranks:
        assert rank.wait() == 0, rank.text()
        assert "step 3: loss = nan; features are not finite on rank 1 (uids " in rank.text()
        assert "on rank 0" not in rank.text()
    reports = [json.loads(path.read_text("utf-8")) for path in sorted((runs / "run").glob("nonfinite_*.json"))]
    assert [(report["rank"], report["features_finite"], len(report["uids"])) for report in reports] == [
        (0, True, 4),
        (1, False, 4),
    ]
