"""`neuclip subset` of a synthetic pool's metadata, filter by filter: `python tools/bench.py subset`.

Captions are words: a third are names of ImageNet-21k's classes, the others such as stand in every text; in a third of
the captions those are of other languages. CPU is of the process and its workers, start and end included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_audit import reading_cpu_seconds, resident

_ROWS_OF_A_FILE = 500_000
_ENGLISH = ("the", "a", "of", "in", "and", "with", "for", "on", "photo", "new", "old", "from")
_OTHERS = ("und", "der", "les", "pour", "para", "con", "una", "nicht", "на", "для", "是", "的")


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Select from a pool by each of DataComp's filters that need no embeddings."""

    rows: int = 5_000_000
    """Of the pool, in parquets of half a million; 100000 is a quick look."""
    filters: tuple[str, ...] = (
        "no_filter",
        "clip_score --arch l14 --threshold 0.25",
        "clip_score --arch l14 --fraction 0.3",
        "basic_filter --english no",
        "basic_filter",
        "text_based --names imagenet21k --english no",
    )
    """Each measured in a process of its own."""
    num_workers: int = 1
    """Processes; DuckDB takes as many threads."""
    folder: str = ""
    """Where to work; a temporary folder otherwise. 5 million rows take 0.5 GB."""
    json: str = ""
    """Write every measurement to this file."""


def measure(options: Subset) -> dict[str, Any]:
    """Make the pool and select from it; returns what --json holds."""
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        folder = Path(name)
        make_pool(folder / "pool", options.rows)
        bound = reading_cpu_seconds(folder / "pool")
        filters = {each: _measure(options, folder, each) for each in options.filters}
        for measured in filters.values():
            measured["share_of_bound"] = bound / measured["cpu_seconds"]
        return {"bound_cpu_seconds": bound, "filters": filters}


def show(options: Subset, result: dict[str, Any]) -> None:
    """Print what each filter took."""
    bound = f"reading every column once takes {result['bound_cpu_seconds']:.1f} s of CPU"
    print(f"{options.rows:,} rows, {options.num_workers} process(es); {bound}")
    for name, row in result["filters"].items():
        speed = f"{row['seconds']:7.1f} s, {row['rows_per_cpu_second']:11,.0f} rows per second of CPU"
        print(f"{name:<45} {speed}, peak {row['peak_bytes'] / 1e9:.2f} GB, {row['num_uids']:,} uids")


def make_pool(folder: Path, rows: int) -> None:
    """Parquets with DataComp's columns."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import timm

    names = (Path(timm.__file__).parent / "data" / "_info" / "imagenet_synset_to_lemma.txt").read_text("utf-8")
    nouns = sorted({name for line in names.splitlines() for name in line.split("\t")[1].split(", ") if " " not in name})
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number, begin in enumerate(range(0, rows, _ROWS_OF_A_FILE)):
        count = min(_ROWS_OF_A_FILE, rows - begin)
        digits = rng.bytes(16 * count).hex()
        table = pa.table(
            {
                "uid": [digits[32 * i : 32 * i + 32] for i in range(count)],
                "url": [f"http://images.test/{begin + i}.jpg" for i in range(count)],
                "text": list(_captions(rng, count, nouns)),
                "original_width": rng.integers(50, 2000, count),
                "original_height": rng.integers(50, 2000, count),
                "clip_b32_similarity_score": rng.normal(0.25, 0.05, count),
                "clip_l14_similarity_score": rng.normal(0.2, 0.06, count),
            }
        )
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=100_000)


def _captions(rng: Any, count: int, nouns: list[str]) -> Any:
    lengths = rng.integers(1, 16, count).tolist()
    nouns_at = rng.integers(0, len(nouns), sum(lengths)).tolist()
    kinds = rng.integers(0, 3, sum(lengths)).tolist()
    is_other = (rng.random(count) < 1 / 3).tolist()
    place = 0
    for length, other in zip(lengths, is_other, strict=True):
        common = _OTHERS if other else _ENGLISH
        at = range(place, place + length)
        yield " ".join(common[nouns_at[i] % len(common)] if kinds[i] else nouns[nouns_at[i]] for i in at)
        place += length


def _measure(options: Subset, folder: Path, each: str) -> dict[str, Any]:
    import psutil

    output = folder / "out.npy"
    command = [sys.executable, "-m", "neuclip_scale", "subset", "--metadata-dir", folder / "pool"]
    command += ["--save-path", output, "-j", options.num_workers, "--num-threads", options.num_workers]
    began, before = time.perf_counter(), os.times()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*map(str, command), "--name", *each.split()], stdout=log, stderr=log)
        tree, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, resident(tree))
            time.sleep(0.05)
    after = os.times()
    if process.returncode:
        raise SystemExit(f"the selection failed: {(folder / 'log').read_text()[-2000:]}")
    document = json.loads(output.with_name("out.npy.json").read_bytes())
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": cpu,
        "rows_per_cpu_second": options.rows / cpu,
        "peak_bytes": peak,
        "num_uids": document["num_uids"],
        "filters": {part["name"]: [part["asked"], part["passed"]] for part in document["filters"]},
    }
