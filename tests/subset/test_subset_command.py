"""`neuclip subset` as its users run it: names, exit status, restarts, damage, and the resharder after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from reshard_helpers import read_tar, simple_pool
from reshard_helpers import run as reshard
from subset_helpers import Row, expected, is_basic, row_of, run, select, uids, write_pool, write_rows

from neuclip_scale.subset import BasicFilter, ClipScoreFilter, SubsetError, SubsetRequest, select_subset
from neuclip_scale.subset import pool as pool_module
from neuclip_scale.subset import selecting as selecting_module


@pytest.fixture
def found() -> list[Row]:
    return [row_of(number, original_width=150 + number, lang="en" if number % 3 else "de") for number in range(120)]


@pytest.fixture
def pool(tmp_path: Path, found: list[Row]) -> Path:
    schema = pa.Table.from_pylist(found).schema
    return write_pool(tmp_path / "pool", [found[:50], found[50:70], found[70:]], schema=schema, row_group_size=16)


def report(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_name(path.name + ".json").read_bytes()))


def test_names_of_datacomp(pool: Path, found: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "made" / "out.npy"
    base = ("--metadata_dir", pool, "--save_path", out, "--num_workers", 1)
    assert run(*base, "--name", "no_filter") == 0
    assert uids(out) == expected(found, lambda row: True)

    assert run(*base, "--name", "clip_score", "--arch", "b32", "--threshold", 0.1) == 0
    assert uids(out) == expected(found, lambda row: row["clip_b32_similarity_score"] >= 0.1)

    assert run(*base, "--name", "clip_score", "--arch", "l14", "--fraction", 0.3) == 0
    assert uids(out) == expected(found[:36], lambda row: True)

    assert run(*base, "--name", "basic_filter", "--language-column", "lang", "--json", tmp_path / "copy.json") == 0
    assert uids(out) == expected(found, lambda row: is_basic(row) and row["lang"] == "en")
    document = report(out)
    assert json.loads((tmp_path / "copy.json").read_bytes()) == document
    assert (document["num_rows"], document["num_uids"], document["status"]) == (120, len(uids(out)), 0)
    assert [(each["name"], each["asked"], each["passed"]) for each in document["filters"]] == [
        ("basic", 120, 70),
        ("english", 70, len(uids(out))),
    ]

    both = ("--name", "basic_filter", "--english", "no", "--name", "clip_score", "--arch", "b32", "--fraction", 0.25)
    assert run(*base, *both, "--min-side", 260) == 0
    assert uids(out) == expected(found[110:], lambda row: True)

    assert run(*base, "--name", "laion2b", "--language-column", "lang") == 0
    assert uids(out) == []
    assert np.load(out).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "clip_score", "--fraction", "0.3"], "give --arch l14 or --arch b32"),
        (["--name", "clip_score", "--arch", "l14"], "give either --fraction or --threshold"),
        (["--name", "basic_filter", "--fraction", "0.3"], "--fraction: belongs to --name clip_score"),
        (["--name", "no_filter", "--min-side", "9"], "--min-side: belongs to --name basic_filter"),
        (["--name", "image_based"], "give --centroids"),
        (["--name", "text_based"], "give --wordnet"),
        (["--name", "laion2b", "--name", "clip_score", "--arch", "b32", "--threshold", "0.1"], "asked for twice"),
        (["--name", "basic_filter", "--english", "no", "--language-column", "x"], "--english no: leave out"),
        (["--name", "no_filter", "--uid-column", "id"], "has no column id"),
        (["--name", "no_filter", "--save-path", "out.txt"], "must end in .npy"),
        (["--name", "no_filter", "--metadata-dir", "/nothing"], "no .parquet there"),
        (["--name", "no_filter", "--memory-limit", "much"], None),
        (
            ["--name", "clip_score", "--arch", "l14", "--fraction", "0.3", "--memory-limit", "much"],
            "--memory-limit 'much'",
        ),
    ],
)
def test_bad_usage_is_told(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str | None
) -> None:
    status = run("--metadata-dir", pool, "--save-path", tmp_path / "out.npy", "-j", 1, *options)
    told = capsys.readouterr().err
    assert status == (2 if message else 0), told
    assert message is None or message in told
    assert (tmp_path / "out.npy").exists() == (message is None)


def test_a_complete_result_is_kept_until_something_changes(pool: Path, found: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    first = select(pool, out, BasicFilter())
    stamp = out.stat().st_mtime_ns
    again = select(pool, out, BasicFilter())
    assert again.was_there
    assert out.stat().st_mtime_ns == stamp
    assert (again.num_uids, again.filters) == (first.num_uids, first.filters)

    assert not select(pool, out, BasicFilter(min_side=201)).was_there
    other = select(pool, tmp_path / "other.npy", BasicFilter(min_side=201))
    assert report(out)["digest"] == other.digest

    out.write_bytes(out.read_bytes()[:-16])
    assert not select(pool, out, BasicFilter(min_side=201)).was_there
    more = row_of(999, lang="en")
    write_rows(pool / "00003.parquet", [more], schema=pa.Table.from_pylist([more]).schema)
    made = select(pool, out, BasicFilter(min_side=201))
    assert more["uid"] in uids(out)
    assert made.filters_digest == other.filters_digest
    assert not list(tmp_path.glob(".*"))


def test_a_file_whose_name_is_no_text_is_listed(pool: Path, found: list[Row], tmp_path: Path) -> None:
    os.rename(pool / "00001.parquet", os.fsencode(pool) + b"/\xff.parquet")
    made = select(pool, tmp_path / "out.npy", ClipScoreFilter("l14", threshold=-1.0))
    assert made.status == 1
    assert [lost.file for lost in made.unreadable] == [r"\udcff.parquet"]
    assert report(tmp_path / "out.npy")["unreadable"][0]["file"] == r"\udcff.parquet"


def test_folders_behind_links_are_part_of_a_pool(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", [[row_of(1)]])
    write_pool(tmp_path / "elsewhere", [[row_of(2)]])
    (tmp_path / "pool" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "pool")
    assert select(tmp_path / "pool", tmp_path / "out.npy").num_rows == 2


def test_a_fraction_of_no_row_is_told_again(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", [[row_of(1), row_of(2)]])
    for _ in range(2):
        asked = "--name", "clip_score", "--arch", "l14", "--fraction", 0.3
        assert run("--metadata_dir", tmp_path / "pool", "--save_path", tmp_path / "out.npy", "-j", 1, *asked) == 0
        assert uids(tmp_path / "out.npy") == []


def test_any_slices_and_processes_give_the_same_bytes(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = BasicFilter(), ClipScoreFilter("l14", 0.5)
    select(pool, tmp_path / "one.npy", *filters)
    select(pool, tmp_path / "two.npy", *filters, num_workers=2)
    monkeypatch.setattr(pool_module, "ROWS_OF_A_SLICE", 20)
    select(pool, tmp_path / "many.npy", *reversed(filters))
    assert {(tmp_path / f"{name}.npy").read_bytes() for name in ("one", "two", "many")} == {
        (tmp_path / "one.npy").read_bytes()
    }


def test_killed_it_goes_on(pool: Path, found: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.npy"
    filters = BasicFilter(), ClipScoreFilter("l14", 0.5)
    script = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from neuclip_scale.subset import *\n"
        "def stop(stage, done, whole):\n"
        "    if stage == 'filtering' and done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "filters = BasicFilter(), ClipScoreFilter('l14', 0.5)\n"
        f"select_subset(SubsetRequest({str(pool)!r}, Path({str(out)!r}), filters), stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    work = next(tmp_path.glob(".out.npy.work/parts-*"))
    assert len(list(work.glob("*.json"))) == 2
    # What is complete is not made again: neither the cut nor the first two slices.
    stamps = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    monkeypatch.setattr(selecting_module, "find_cut", None)
    seen = {}

    def look(stage: str, done: int, whole: int) -> None:
        if stage == "joining lists":
            seen.update({path.name: path.stat().st_mtime_ns for path in work.iterdir()})

    select_subset(SubsetRequest(str(pool), out, filters), look)
    assert stamps.items() <= seen.items()
    assert uids(out) == expected(found[:60], is_basic)
    assert not work.exists()


def test_interrupted_it_goes_on_beside_a_damaged_file(pool: Path, found: list[Row], tmp_path: Path) -> None:
    """What was kept belongs to the slices that were judged, whichever files could be read."""
    broken, out = pool / "00000.parquet", tmp_path / "out.npy"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:4] + bytes(byte ^ 0x5A for byte in whole[4:2000]) + whole[2000:])

    def stop(stage: str, done: int, whole: int) -> None:
        if stage == "filtering":
            raise KeyboardInterrupt

    request = SubsetRequest(str(pool), out, (ClipScoreFilter("l14", 0.5),))
    with pytest.raises(KeyboardInterrupt):
        select_subset(request, stop)
    made = select_subset(request)
    assert [each.file for each in made.unreadable] == ["00000.parquet"]
    assert uids(out) == expected(found[50:85], lambda row: True)
    assert made.num_rows == 70


def test_damaged_files_are_left_out_and_listed(
    pool: Path, found: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = found[:50] + found[70:]
    broken = pool / "00001.parquet"
    whole = broken.read_bytes()
    base = ("--metadata-dir", pool, "--save-path", tmp_path / "out.npy", "-j", 1)

    broken.write_bytes(whole[: len(whole) // 2])
    assert run(*base, "--name", "no_filter") == 1
    assert uids(tmp_path / "out.npy") == expected(rest, lambda row: True)
    assert "00001.parquet: no whole parquet file" in capsys.readouterr().out.replace("\n", " ")

    # Its footer is sound, its pages are not: that is found by the query over all, and by reading.
    broken.write_bytes(whole[:4] + bytes(byte ^ 0x5A for byte in whole[4:2000]) + whole[2000:])
    assert run(*base, "--name", "clip_score", "--arch", "l14", "--fraction", "0.5") == 1
    assert uids(tmp_path / "out.npy") == expected(found[:50], lambda row: True)
    lost = report(tmp_path / "out.npy")["unreadable"]
    assert [(each["file"], each["num_rows"]) for each in lost] == [("00001.parquet", 20)]
    assert run(*base, "--name", "clip_score", "--arch", "b32", "--threshold", "0") == 1
    assert uids(tmp_path / "out.npy") == expected(rest, lambda row: True)

    # Mended, the same command takes it.
    broken.write_bytes(whole)
    assert run(*base, "--name", "clip_score", "--arch", "b32", "--threshold", "0") == 0
    assert uids(tmp_path / "out.npy") == expected(found, lambda row: True)

    for odd in (pa.int32(), pa.string()):
        rows = [{"uid": "0" * 32, "clip_b32_similarity_score": None}]
        write_rows(broken, rows, schema=pa.schema([("uid", pa.string()), ("clip_b32_similarity_score", odd)]))
        assert run(*base, "--name", "clip_score", "--arch", "b32", "--threshold", "0") == 1
        assert f"is {odd}" in report(tmp_path / "out.npy")["unreadable"][0]["fault"]


def test_a_remote_pool(found: list[Row], pool: Path, tmp_path: Path) -> None:
    """Its parquets are copied while they are needed."""
    system = fsspec.filesystem("memory")
    for path in pool.iterdir():
        system.pipe(f"/metadata/{path.name}", path.read_bytes())
    made = select("memory://metadata", tmp_path / "out.npy", BasicFilter(), ClipScoreFilter("l14", 0.5))  # type: ignore[arg-type]
    assert uids(tmp_path / "out.npy") == expected(found[:60], is_basic)
    assert (made.status, made.num_rows) == (0, 120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "out.npy.json", "pool"]
    with pytest.raises(SubsetError, match=r"memory://nowhere.*no \.parquet there"):
        select("memory://nowhere", tmp_path / "out.npy")  # type: ignore[arg-type]


def test_the_resharder_takes_it(tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool", shards=3, samples=20)
    samples = [sample for shard in shards for sample in shard]
    rows = [row_of(number, uid=sample.uid) for number, sample in enumerate(samples)]
    write_pool(tmp_path / "metadata", [rows[:30], rows[30:]])
    out = tmp_path / "top.npy"
    name = ("--name", "clip_score", "--arch", "l14", "--fraction", 0.25)
    assert run("--metadata-dir", tmp_path / "metadata", "--save-path", out, *name) == 0
    assert reshard("-i", tmp_path / "pool", "-o", tmp_path / "new", "-s", out, "-j", 1) == 0
    kept = [
        json.loads(members["json"])["uid"] for tar in (tmp_path / "new").glob("*.tar") for _, members in read_tar(tar)
    ]
    assert kept == [sample.uid for sample in samples[:15]]


def test_importing_it_loads_no_heavy_library() -> None:
    script = (
        "import sys, neuclip_scale.commands.subset\n"
        "heavy = {'torch', 'duckdb', 'ibis', 'fasttext', 'pyspark', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
