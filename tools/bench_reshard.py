"""Resharding beside what people use, a bare header walk and the disk's own copy: `python tools/bench.py reshard`.

Every contender is a fresh process over the same shards, by turns; the shards are in the page cache. `seconds` are those
of the whole process; `work_seconds` and `work_cpu_seconds` (user and system, of all its processes) leave the
interpreter's start and imports out. Where others use the machine too, only the CPU's seconds can be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

CONTENDERS = ("ours", "tarfile", "webdataset")
"""Each is run twice: on what is to be kept, and on everything."""
BOUNDS = ("copy and compare", "header walk", "cp")
_SAMPLES_OF_A_SHARD = 5000


@dataclass(frozen=True, kw_only=True)
class Reshard:
    """Reshard a pool of synthetic samples with one worker, and the planner alone over many uids."""

    samples: int = 20_000
    """Input samples; 2,000 is a quick look."""
    sample_bytes: int = 27_000
    """Mean bytes of a picture; a json of 500 bytes and a caption are beside it."""
    keep: float = 0.3
    """Share that is kept."""
    pax: bool = True
    """Give members times with fractions, and so a pax header each, as webdataset and img2dataset write them."""
    workers: int = 1
    """Also measure ours with this many processes."""
    repeats: int = 3
    """Measurements of each contender."""
    folder: str = ""
    """Where to work; a temporary folder otherwise. A tmpfs shows the core's work, a disk the disk's."""
    plan_uids: int = 0
    """Also plan this many uids from a pool a quarter larger, synthetic, and report time and peak of memory."""
    json: str = ""
    """Write every measurement to this file."""


def make_pool(options: Reshard, folder: Path) -> None:
    """Shards, parquets and the subset file."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, noise = random.Random(0), os.urandom(max(1 << 20, 2 * options.sample_bytes))  # pictures are 1.4 at most
    kept = []
    (folder / "pool").mkdir()
    for shard, begin in enumerate(range(0, options.samples, _SAMPLES_OF_A_SHARD)):
        keys, uids = [], []
        with tarfile.open(folder / "pool" / f"{shard:08d}.tar", "w") as archive:
            for number in range(min(_SAMPLES_OF_A_SHARD, options.samples - begin)):
                keys.append(f"{shard:08d}{number:04d}")
                uids.append(hashlib.md5(keys[-1].encode()).hexdigest())
                for extension, data in sample(keys[-1], uids[-1], options, rng, noise):
                    info = tarfile.TarInfo(f"{keys[-1]}.{extension}")
                    info.size, info.mtime = len(data), 1_700_000_000 + (rng.random() if options.pax else 0)
                    archive.addfile(info, io.BytesIO(data))
        pq.write_table(pa.table({"key": keys, "uid": uids}), folder / "pool" / f"{shard:08d}.parquet")
        kept += [uid for uid in uids if rng.random() < options.keep]
    if not kept:
        reason = f"by chance it keeps none of --samples {options.samples}"
        raise SystemExit(f"--keep {options.keep}: {reason}. Give more samples or a larger share.")
    rows = sorted(divmod(int(uid, 16), 1 << 64) for uid in kept)
    np.save(folder / "subset.npy", np.array(rows, dtype="u8,u8"))


def sample(key: str, uid: str, options: Reshard, rng: random.Random, noise: bytes) -> Iterator[tuple[str, bytes]]:
    """Members of one sample."""
    size = int(options.sample_bytes * rng.uniform(0.6, 1.4))
    begin = rng.randrange(len(noise) - size)
    record = {"uid": uid, "key": key, "status": "success", "url": f"https://example.org/{uid}.jpg", "width": 512}
    record |= {"caption": "some words about a picture " * 3, "exif": "{}", "sha256": uid * 2}
    yield "jpg", noise[begin : begin + size]
    yield "json", json.dumps(record).encode()
    yield "txt", b"some words about a picture"


def child(name: str, folder: Path) -> None:
    """Run one contender in this process and print a JSON line."""
    work = _prepared(name, folder / "pool", folder / "out", folder / "subset.npy")
    before, began = _cpu_seconds(), time.perf_counter()
    work()
    print(json.dumps({"work_seconds": time.perf_counter() - began, "work_cpu_seconds": _cpu_seconds() - before}))


def _prepared(name: str, pool: Path, out: Path, subset: Path) -> Callable[[], object]:
    """What a contender does, with everything imported."""
    import numpy as np

    who, _, rest = name.partition(", ")
    what, _, workers = rest.partition(", -j ")
    if who == "ours":
        import pyarrow.parquet

        from neuclip_scale.commands import reshard
        from neuclip_scale.reshard import copying, finishing, planning, running

        del copying, finishing, planning, running, pyarrow
        arguments = ["-i", str(pool), "-o", str(out), "-j", workers or "1", *(["-s", str(subset)] * (what == "kept"))]
        return lambda: _silently(lambda: reshard.main(arguments))
    wanted = np.sort(np.load(subset)) if what == "kept" else None
    if who == "tarfile":
        return lambda: tarfile_filter(pool, out, wanted)
    if who == "webdataset":
        import webdataset

        del webdataset
        return lambda: webdataset_filter(pool, out, wanted)
    if who == "copy and compare":
        return lambda: copy_and_compare(pool, out)
    if who == "header walk":
        from neuclip_scale.data.shards import index_shard

        return lambda: [index_shard(path) for path in sorted(pool.glob("*.tar"))]
    return lambda: subprocess.run(["cp", "-r", pool, out], check=True)


def _silently(run: Callable[[], int]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert run() == 0


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def copy_and_compare(pool: Path, out: Path) -> None:
    """What resharding everything cannot do without: read, CRC-32, write, read back, compare."""
    import numpy as np

    out.mkdir()
    data, again = np.empty(1 << 20, dtype=np.uint8), np.empty(1 << 20, dtype=np.uint8)
    for path in sorted(pool.glob("*.tar")):
        with open(path, "rb", buffering=0) as source, open(out / path.name, "w+b", buffering=0) as target:
            offset = 0
            while size := source.readinto(data.data):
                zlib.crc32(data.data[:size])
                os.pwrite(target.fileno(), data.data[:size], offset)
                os.preadv(target.fileno(), [again.data[:size]], offset)
                assert np.array_equal(data[:size].view(np.uint64), again[:size].view(np.uint64))
                offset += size


def tarfile_filter(pool: Path, out: Path, wanted: np.ndarray | None) -> None:
    """The script one would write: read every member, keep samples whose uid is wanted, write with `tarfile`."""
    uids = None if wanted is None else {(int(row["f0"]) << 64) | int(row["f1"]) for row in wanted}
    out.mkdir()
    for path in sorted(pool.glob("*.tar")):
        with tarfile.open(path) as source, tarfile.open(out / path.name, "w") as target:
            group: list[tuple[tarfile.TarInfo, bytes]] = []
            for info in [*source, None]:
                if group and (info is None or info.name.split(".")[0] != group[0][0].name.split(".")[0]):
                    record = next(data for member, data in group if member.name.endswith(".json"))
                    if uids is None or int(json.loads(record)["uid"], 16) in uids:
                        for member, data in group:
                            target.addfile(member, io.BytesIO(data))
                    group = []
                if info is not None:
                    file = source.extractfile(info)
                    group.append((info, file.read() if file else b""))


def webdataset_filter(pool: Path, out: Path, wanted: np.ndarray | None) -> None:
    """The loop of DataComp's resharder, in one process: webdataset reads and writes, a sorted array is asked."""
    import numpy as np
    import webdataset

    out.mkdir()
    paths = [str(path) for path in sorted(pool.glob("*.tar"))]
    samples = webdataset.DataPipeline(webdataset.SimpleShardList(paths), webdataset.tarfile_to_samples())
    with webdataset.TarWriter(str(out / "00000000.tar")) as target:
        for sample in samples:
            uid = json.loads(sample["json"])["uid"]
            if wanted is not None:
                pair = np.array([divmod(int(uid, 16), 1 << 64)], wanted.dtype)[0]
                if np.searchsorted(wanted, pair, "left") == np.searchsorted(wanted, pair, "right"):
                    continue
            target.write({**sample, "__key__": uid})


def check(options: Reshard) -> None:
    """Raise SystemExit for a pool of which nothing could be kept."""
    if not 0 < options.keep <= 1:
        raise SystemExit(f"--keep {options.keep}: no share of which something is kept. Give one above 0, up to 1.")
    for field in ("samples", "sample_bytes", "workers"):
        if getattr(options, field) < 1:
            name, value = field.replace("_", "-"), getattr(options, field)
            raise SystemExit(f"--{name} {value}: there would be nothing to reshard, or nobody. Give 1 or more.")


def measure(options: Reshard) -> dict[str, Any]:
    """All contenders by turns; returns what --json holds."""
    folder = Path(tempfile.mkdtemp(prefix="bench-reshard-", dir=options.folder or None))
    try:
        make_pool(options, folder)
        pool_bytes = sum(path.stat().st_size for path in (folder / "pool").glob("*.tar"))
        subprocess.run(["sync"], check=True)
        names = [f"{who}, {what}" for what in ("kept", "everything") for who in CONTENDERS]
        if options.workers > 1:
            names += [f"ours, {what}, -j {options.workers}" for what in ("kept", "everything")]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in (*names, *BOUNDS)}
        for repeat in range(options.repeats):
            for name in runs:
                print(f"\r{repeat + 1}/{options.repeats} {name:<24}", end="", file=sys.stderr, flush=True)
                runs[name].append(_run(name, folder))
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    rows = [_row(name, runs[name], options, pool_bytes) | _compared(name, runs) for name in runs]
    result = {"pool_bytes": pool_bytes, "rows": rows, "runs": runs}
    return result | ({"plan": planned(options.plan_uids)} if options.plan_uids else {})


def _run(name: str, folder: Path) -> dict[str, float]:
    out = folder / "out"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, name, folder], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    written = sum(path.stat().st_size for path in out.glob("*.tar")) if out.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    return {"seconds": seconds, "written_bytes": written, **json.loads(done.stdout)}


def _row(name: str, runs: list[dict[str, float]], options: Reshard, pool_bytes: int) -> dict[str, Any]:
    work, cpu = (statistics.median(run[name] for run in runs) for name in ("work_seconds", "work_cpu_seconds"))
    return {
        "contender": name,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "work_seconds": work,
        "work_seconds_range": [min(run["work_seconds"] for run in runs), max(run["work_seconds"] for run in runs)],
        "work_cpu_seconds": cpu,
        "work_cpu_seconds_range": [
            min(run["work_cpu_seconds"] for run in runs),
            max(run["work_cpu_seconds"] for run in runs),
        ],
        "cpu_microseconds_per_input_sample": cpu / options.samples * 1e6,
        "output_mb_per_cpu_second": runs[0]["written_bytes"] / cpu / 1e6,
        "input_samples_per_second": options.samples / work,
        "input_samples_per_second_with_start": options.samples / statistics.median(run["seconds"] for run in runs),
        "output_bytes": runs[0]["written_bytes"],
        "output_mb_per_second": runs[0]["written_bytes"] / work / 1e6,
        "input_mb_per_second": pool_bytes / work / 1e6,
    }


def _compared(name: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Ratio of CPU time to the tarfile filter's of the same, within a round; of ours that keeps everything, how much
    of it the bound is. The bounds have no peer, and what filters cannot do without is less, for they verify nothing.
    """
    who, _, rest = name.partition(", ")
    peer = f"tarfile, {rest.partition(', ')[0]}"
    if who not in CONTENDERS or peer not in runs:
        return {}

    def ratios(over: str, under: str) -> list[float]:
        pairs = zip(runs[over], runs[under], strict=True)
        return [left["work_cpu_seconds"] / right["work_cpu_seconds"] for left, right in pairs]

    each = ratios(name, peer)
    row = {"peer": peer, "time_ratio": statistics.median(each), "time_ratio_range": [min(each), max(each)]}
    if who == "ours" and rest.startswith("everything"):
        row["share_of_bound"] = statistics.median(ratios("copy and compare", name))
    return row


def planned(num_uids: int) -> dict[str, Any]:
    """Time and peak memory of the planner alone, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "plan", str(num_uids)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the planner failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def plan_child(num_uids: int) -> None:
    """Read a subset file of `num_uids`, match it with a pool a quarter larger, shuffle, cut, save."""
    import numpy as np

    from neuclip_scale.reshard.matching import match_pool
    from neuclip_scale.reshard.plan import Cut, make_plan
    from neuclip_scale.reshard.request import load_request
    from neuclip_scale.reshard.scanning import Extents, ScannedShard
    from neuclip_scale.reshard.uids import Uids

    def numbers(begin: int, end: int, salt: int) -> np.ndarray:
        z = np.arange(begin, end, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        return z ^ (z >> np.uint64(27))

    def scanned(samples: int) -> Iterator[ScannedShard]:
        for number, begin in enumerate(range(0, samples, 10_000)):
            end = min(begin + 10_000, samples)
            first = np.arange(end - begin, dtype=np.uint32) * 60
            extents = Extents(first, np.full_like(first, 60), np.full_like(first, 60))
            yield ScannedShard(f"{number:08d}.tar", Uids(numbers(begin, end, 1), numbers(begin, end, 2)), extents)

    pool = num_uids * 5 // 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subset.npy"
        array = np.lib.format.open_memmap(path, "w+", dtype=np.dtype("u8,u8"), shape=(num_uids,))
        for begin in range(0, num_uids, 1 << 20):  # four of five: the last fifth of the pool is not asked for
            end = min(begin + (1 << 20), num_uids)
            array["f0"][begin:end], array["f1"][begin:end] = numbers(begin, end, 1), numbers(begin, end, 2)
        array.flush()
        del array
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        clear_peak()
        seconds = {}
        request = load_request(path)
        seconds["request"], began = time.perf_counter() - began, time.perf_counter()
        match = match_pool(request, scanned(pool))
        del request
        seconds["match"], began = time.perf_counter() - began, time.perf_counter()
        counts = match.counts
        plan = make_plan(match.rows, Cut(samples=10_000), 0)
        seconds["order"] = time.perf_counter() - began
    peak = peak_bytes()
    result = {"uids": num_uids, "pool_samples": pool, "found": counts.found, "outputs": plan.num_outputs}
    print(json.dumps({**result, "seconds": seconds, "peak_bytes": peak, "max_rss_before": before * 1024}))


def clear_peak() -> None:
    """Let the kernel's peak of resident memory begin anew: writing the input file is not the planner's."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak of resident memory since `clear_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def show(options: Reshard, result: dict[str, Any]) -> None:
    """Print the comparison."""
    megabytes = result["pool_bytes"] / 1e6
    print(
        f"{options.samples:,} samples, {megabytes:,.0f} MB in page cache, {options.keep:.0%} kept; us of CPU per sample"
    )
    print(
        f"{'':<26}{'seconds':>9}{'CPU s':>8}{'us/sample':>11}{'samples/s':>11}{'out MB/s':>10}{'MB/CPU s':>10}"
        f"{'of tarfile':>12}{'of bound':>10}"
    )
    for row in result["rows"]:
        ratio = f"{row['time_ratio']:.2f}" if "time_ratio" in row else "-"
        share = f"{row['share_of_bound']:.0%}" if "share_of_bound" in row else "-"
        print(
            f"{row['contender']:<26}{row['work_seconds']:>9.2f}{row['work_cpu_seconds']:>8.2f}"
            f"{row['cpu_microseconds_per_input_sample']:>11.1f}{row['input_samples_per_second']:>11,.0f}"
            f"{row['output_mb_per_second']:>10,.0f}{row['output_mb_per_cpu_second']:>10,.0f}{ratio:>12}{share:>10}"
        )
    if "plan" in result:
        plan = result["plan"]
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan["seconds"].items())
        print(f"planner alone, {plan['uids']:,} uids: peak {plan['peak_bytes'] / 1e9:.2f} GB; {times}")


if __name__ == "__main__":
    if sys.argv[1] == "plan":
        plan_child(int(sys.argv[2]))
    else:
        child(sys.argv[1], Path(sys.argv[2]))
