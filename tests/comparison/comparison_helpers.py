"""Run folders as the trainer leaves them, written file by file so that each can be changed or broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neuclip_scale.config import dump_recipe, load_recipe

ENVIRONMENT = {
    "neuclip_scale": "0.1.0",
    "git": {"commit": "a" * 40, "dirty": False},
    "python": "3.11.7",
    "packages": {"torch": "2.7.0", "numpy": "2.0.0"},
    "hostname": "one",
    "cpu": "some",
    "num_cpus": 2,
    "gpus": [],
    "world_size": 1,
    "compiled_towers": False,
    "command": ["neuclip", "train"],
}


def evaluation(top1: float = 0.5, recall: float = 0.4, **changes: Any) -> dict[str, Any]:
    """What `evaluate_folder` returns for a zero-shot and a retrieval set."""
    recalls = {"recall@1": recall, "recall@5": 0.6, "recall@10": 0.7}
    chances = {"recall@1": 0.01, "recall@5": 0.05, "recall@10": 0.1}
    zero_shot = {"task": "zeroshot", "top1": top1, "top5": 0.8, "mean_per_class_recall": top1}
    zero_shot |= {"chance_top1": 0.1, "chance_top5": 0.5, "majority": 0.2, "num_pictures": 30, "num_classes": 10}
    retrieval = {"task": "retrieval", "image_to_text": recalls, "text_to_image": recalls, "num_pictures": 100}
    retrieval |= {"chance_image_to_text": chances, "chance_text_to_image": chances, "num_texts": 100}
    return {"retrieval": retrieval, "zeroshot": zero_shot | changes}


def write_run(
    path: Path,
    *,
    steps: int = 4,
    digests: dict[int, str] | None = None,
    contents: dict[int, str | None] | None = None,
    scores: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    num_bytes: int = 1000,
    **recipe: Any,
) -> Path:
    """A finished run of `steps` steps of 8; `recipe` holds fields with __ for the dot (`train__num_steps=9`).

    The digests of a step follow from seed and step, as they do for real data; `digests` and `contents` change some.
    """
    fields = {"run_dir": str(path), "train.num_steps": steps, "train.global_batch_size": 8}
    fields |= {name.replace("__", "."): value for name, value in recipe.items()}
    resolved = load_recipe("demo", fields)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_recipe(resolved), "utf-8")
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT | (environment or {})), "utf-8")
    shard = {"path": "/data/0.tar", "num_samples": 40, "num_bytes": num_bytes, "mtime_ns": 1, "first_index": 0}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "shards": [{**shard, "fault": ""}]}), "utf-8")
    lines = [
        {
            "step": step,
            "samples_seen": 8 * step,
            "loss": 3 / step,
            "batch_digest": (digests or {}).get(step, f"{resolved.seed}-{step}"),
            "content_digest": (contents or {}).get(step, f"read {resolved.seed}-{step}"),
            "step_time": 0.5,
            "num_skipped": 0,
            "peak_memory_bytes": 2**30 + step,
        }
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    done = {"status": "finished", "step": steps, "num_steps": steps, "samples_seen": 8 * steps, "samples_skipped": 0}
    done |= {"train_seconds": 0.5 * steps, "device_hours": 0.5 * steps / 3600, "samples_per_second": 16.0}
    done |= {"world_size": 1, "device": "cpu", "evaluation": evaluation() if scores is None else scores}
    (path / "summary.json").write_text(json.dumps(done | (summary or {})), "utf-8")
    return path
