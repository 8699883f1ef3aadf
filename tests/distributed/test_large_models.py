"""ViT-L/14 and ViT-H/14 at full width and one block a tower, under the engines that shard them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from forking import preload_deepspeed
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.checkpoint import describe, find_checkpoint
from neuclip_scale.config import load_recipe
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.planning import plan_memory

preload_deepspeed()
pytestmark = pytest.mark.distributed
WORLD_SIZE = 2


def overrides(folder: str, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_dir": str(Path(folder) / "run"), "data.train": str(Path(folder) / "shards"), "data.num_streams": 2,
        "data.num_workers": 0, "model.image_layers": 1, "model.text_layers": 1, "train.global_batch_size": 8,
        "train.micro_batch_size": 2, "train.num_steps": 1, "optim.warmup_steps": 1, "train.precision": "fp32",
        "objective.npn.num_prototypes": 16, "engine.fsdp.accumulate_sharded": True, **more,
    }  # fmt: skip


def train(folder: str, more: dict[str, Any]) -> dict[str, int]:
    """One step of the datacomp_xlarge recipe and its checkpoint; returns bytes of parameters on this rank."""
    from neuclip_scale.trainer import Trainer

    trainer = Trainer(load_recipe("datacomp_xlarge", overrides(folder, more)))
    assert trainer.fit()["status"] == "finished"
    distributed.barrier()
    return {"parameters": sum(part.nbytes for part in trainer.engine.parts().values())}


@pytest.mark.parametrize(
    ("preset", "engine"),
    [
        pytest.param("ViT-H-14", {"engine.name": "fsdp2"}, marks=pytest.mark.long),
        ("ViT-L-14", {"engine.name": "deepspeed", "engine.deepspeed.config": "zero3"}),
    ],
)
def test_they_start_step_and_save(tmp_path: Path, preset: str, engine: dict[str, str]) -> None:
    write_synthetic_shards(tmp_path / "shards", num_samples=8, samples_per_shard=4, image_size=224, seed=1)
    more = {"model.preset": preset, **engine}
    plan = plan_memory(load_recipe("datacomp_xlarge", overrides(str(tmp_path), more)), WORLD_SIZE)
    planned = {item.name: item.device for item in plan.items}
    for held in run_ranks(WORLD_SIZE, train, str(tmp_path), more):
        assert held["parameters"] == pytest.approx(planned["parameters"], rel=1e-3)
    found = describe(find_checkpoint(tmp_path / "run"))
    assert found["parameters"] == plan.parameters
    assert found["bytes_by_kind"]["exp_avg"] == 4 * plan.parameters
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 < line["grad_norm"] < 1e3
    shutil.rmtree(tmp_path / "run")  # a gigabyte
