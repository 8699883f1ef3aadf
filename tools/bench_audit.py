"""`neuclip audit` of synthetic lists with two downloads: `python tools/bench.py audit`.

Rows are those of the list and of both downloads together. Seconds are of the whole process; memory is the peak of the
sum over the process and its workers, read twenty times a second.
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

_SHARD = 10_000
_ROWS_AT_ONCE = 1_000_000
_ERRORS = (
    "HTTP Error 404: Not Found",
    "<urlopen error [Errno -2] Name or service not known>",
    "HTTP Error 403: Forbidden",
    "timed out",
    "Image decoding error",
)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Audit lists of growing length, each with two downloads (parquets in img2dataset's form, no tars)."""

    rows: tuple[int, ...] = (1_000_000, 5_000_000, 20_000_000)
    """Listed uids; 100000 is a quick look."""
    hosts: int = 300_000
    """Hosts, a few of which have most urls; 1 puts all on one."""
    lost: float = 0.12
    """Share that each download lost, at random and independently."""
    memory_limit: str = "2GB"
    """What the audit's engine may take; its workers and Python come on top."""
    num_workers: int = 2
    """Processes that read shards."""
    folder: str = ""
    """Where to work; a temporary folder otherwise. 20 million uids take 8 GB."""
    json: str = ""
    """Write every measurement to this file."""


def measure(options: Audit) -> dict[str, Any]:
    """Audit every length; returns what --json holds."""
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
            folder = Path(name)
            num_bytes = make_world(folder, rows, options)
            bound = reading_cpu_seconds(folder)
            measured = {"listed": rows, "input_bytes": num_bytes, **_measure(options, folder)}
            total = 3 * rows
            measured |= {
                "bound_cpu_seconds": bound,
                "share_of_bound": bound / measured["cpu_seconds"],
                "rows_per_second": total / measured["seconds"],
                "cpu_microseconds_per_row": 1e6 * measured["cpu_seconds"] / total,
            }
            results.append(measured)
    return {"rows": results}


def show(options: Audit, result: dict[str, Any]) -> None:
    """Print what each length took."""
    print(f"a list and two downloads, each without {options.lost:.0%}; rows are of all three")
    for row in result["rows"]:
        speed = f"{row['seconds']:7.1f} s, {row['rows_per_second']:9,.0f} rows/s"
        cpu, peak = row["cpu_microseconds_per_row"], row["peak_bytes"] / 1e9
        bound = f"{row['bound_cpu_seconds']:.2f} s to read it all once, {row['share_of_bound']:.0%} of the CPU"
        print(f"{row['listed']:>12,} uids: {speed}, {cpu:.2f} us of CPU a row, peak {peak:.2f} GB; {bound}")


def reading_cpu_seconds(folder: Path) -> float:
    """CPU time in which pyarrow reads every column of all parquets below a folder once: whatever asks them does."""
    import pyarrow.parquet as pq

    began = time.process_time()
    for path in sorted(folder.rglob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(use_threads=False):
                pass
    return time.process_time() - began


def make_world(folder: Path, rows: int, options: Audit) -> int:
    """A list and two downloads of it; returns their bytes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for name in ("list", "first", "second"):
        (folder / name).mkdir()
    for begin in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - begin)
        digits = rng.bytes(16 * count).hex()
        uids = pa.array([digits[32 * i : 32 * i + 32] for i in range(count)])
        hosts = (rng.pareto(0.8, count) * 20).astype(np.int64) % options.hosts
        tlds = ("com", "com", "com", "org", "net", "de", "co.uk")
        urls = pa.array([f"http://img{h}.host{h}.{tlds[h % 7]}/{begin + i}.jpg" for i, h in enumerate(hosts.tolist())])
        table = pa.table(
            {
                "uid": uids,
                "url": urls,
                "text": pa.array([f"a caption of picture {i} at {h}" for i, h in enumerate(hosts.tolist())]),
                "original_width": rng.integers(100, 3000, count),
                "original_height": rng.integers(100, 3000, count),
                "clip_l14_similarity_score": rng.normal(0.22, 0.05, count).astype(np.float32),
                "sha256": pa.array([digits[32 * i : 32 * i + 32] * 2 for i in range(count)]),
            }
        )
        pq.write_table(table, folder / "list" / f"{begin // _ROWS_AT_ONCE:04d}.parquet", compression="zstd")
        for name in ("first", "second"):
            fails = rng.random(count) < options.lost
            which = rng.integers(0, len(_ERRORS), count)
            columns = {
                "uid": uids,
                "url": urls,
                "key": pa.array([f"{begin + i:010d}" for i in range(count)]),
                "status": pa.array(np.where(fails, "failed_to_download", "success")),
                "error_message": pa.array([_ERRORS[w] if f else None for f, w in zip(fails, which, strict=True)]),
                "sha256": pa.array(table["sha256"].combine_chunks(), mask=fails),
            }
            part = pa.table(columns)
            for place in range(0, count, _SHARD):
                shard = (begin + place) // _SHARD
                pq.write_table(part.slice(place, _SHARD), folder / name / f"{shard:05d}.parquet", compression="zstd")
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


def _measure(options: Audit, folder: Path) -> dict[str, Any]:
    import psutil

    output = folder / "out"
    command = [sys.executable, "-m", "neuclip_scale", "audit", "--manifest", folder / "list", "--output", output]
    command += ["--download", folder / "first", "--download", folder / "second"]
    command += ["--memory-limit", options.memory_limit, "-j", options.num_workers]
    began, before = time.perf_counter(), os.times()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        tree, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, resident(tree))
            time.sleep(0.05)
    after = os.times()
    if process.returncode != 1:  # a discrepancy was planted
        raise SystemExit(f"the audit failed: {(folder / 'log').read_text()[-2000:]}")
    document = json.loads((output / "audit.json").read_bytes())
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "peak_bytes": peak,
        "cache_bytes": sum(path.stat().st_size for path in (output / "cache").rglob("*") if path.is_file()),
        "missing": [part["counts"]["missing"] for part in document["downloads"]],
        "stages": {name: round(seconds, 2) for name, seconds in document["seconds"].items()},
    }


def resident(tree: Any) -> int:
    """Bytes in memory of a process (`psutil.Process`) and its children."""
    import psutil

    total = 0
    try:
        for process in (tree, *tree.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total
