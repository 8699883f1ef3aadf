"""`neuclip reshard` against tarfile and dicts: any pool, any request, any cut, any number of workers and parts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reshard_helpers import (
    Sample,
    contents,
    finished,
    outputs,
    read_tar,
    run,
    simple_pool,
    start,
    uid_of,
    write_pool,
    write_subset,
)

from neuclip_scale.reshard import ReshardError
from neuclip_scale.reshard.sources import Sources


def totals(folder: Path) -> dict[str, int]:
    return dict(json.loads((folder / "reshard.json").read_bytes())["totals"])


def expected_bodies(shards: list[list[Sample]], wanted: Counter[str] | None) -> list[tuple[str, dict[str, bytes]]]:
    """Members of every sample that should be written, in the pool's order: uid by json, else key; the first wins."""
    seen: set[str] = set()
    bodies = []
    for sample in (sample for shard in shards for sample in shard):
        uid = sample.uid if sample.uid is not None else sample.key
        if uid in seen:
            continue
        seen.add(uid)
        bodies += [(uid, sample.members)] * (1 if wanted is None else wanted[uid])
    return bodies


pools = st.lists(
    st.lists(st.tuples(st.integers(0, 25), st.sampled_from([0, 1, 511, 512, 513, 1900]), st.booleans()), max_size=9),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pool=pools,
    asked=st.lists(st.integers(0, 30), max_size=30),
    size=st.integers(1, 9),
    shuffle=st.booleans(),
    mtime=st.sampled_from([0, 1700000000.5]),
    everything=st.booleans(),
)
def test_any_pool_and_request(tmp_path_factory, pool, asked, size, shuffle, mtime, everything) -> None:
    folder = tmp_path_factory.mktemp("any")
    shards = [
        [Sample(f"{s:05d}{i:04d}", uid_of(str(n)), length, in_json) for i, (n, length, in_json) in enumerate(rows)]
        for s, rows in enumerate(pool)
    ]
    write_pool(folder / "pool", shards, mtime=mtime)
    wanted = None if everything or not asked else Counter(uid_of(str(number)) for number in asked)
    arguments: list[object] = ["-i", folder / "pool", "-j", 1, "--shard-size", size, "--allow-missing"]
    if wanted is not None:
        arguments += ["-s", write_subset(folder / "subset.npy", list(wanted.elements()))]
    arguments += ["--shuffle", "--seed", 3] if shuffle else []
    assert run(*arguments, "-o", folder / "out") == 0

    bodies = [body for _, body in expected_bodies(shards, wanted)]
    got = [sample for path in outputs(folder / "out") for sample in read_tar(path)]
    found = [members for _, members in got]
    if shuffle:
        assert sorted(map(str, found)) == sorted(map(str, bodies))
    else:
        assert found == bodies
    assert len({key for key, _ in got}) == len(got)
    counts = [len(read_tar(path)) for path in outputs(folder / "out")]
    assert not counts or (max(counts) <= size and max(counts) - min(counts) <= 1)
    assert json.loads((folder / "out/sizes.json").read_bytes()) == {
        path.name: count for path, count in zip(outputs(folder / "out"), counts)
    }
    uids = [sample.uid for shard in shards for sample in shard]
    missing = set(wanted or ()) - set(uids)
    assert (folder / "out/missing_uids.txt").read_text().split() == sorted(missing)
    told = totals(folder / "out")
    assert told["read"] == len(uids)
    relevant = [uid for uid in uids if wanted is None or uid in wanted]
    assert told["duplicated"] == len(relevant) - len(set(relevant))
    assert told["written"] == told["found"] == len(bodies)
    assert told["requested"] == (len(bodies) if wanted is None else wanted.total())


def test_bytes_do_not_depend_on_workers_or_parts(tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool", 5, 30)
    subset = write_subset(tmp_path / "s.npy", [s.uid for row in shards for s in row if s.uid][::2] * 2)
    common = ["-i", tmp_path / "pool", "-s", subset, "--shard-size", 17, "--shuffle", "--seed", 7]
    assert run(*common, "-o", tmp_path / "one", "-j", 1) == 0
    assert finished(start(*common, "-o", tmp_path / "three", "-j", 3))[0] == 0
    parts = [start(*common, "-o", tmp_path / "parts", "-j", 1, "--part", f"{i}/2") for i in (1, 2)]
    for process in parts:
        status, text = finished(process)
        assert status == 0, text
    assert run(*common, "-o", tmp_path / "parts", "--finish", "-j", 1, "--verify") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "parts")
    assert len(outputs(tmp_path / "one")) == 9


def test_pax_times_take_the_fast_road_and_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What webdataset and img2dataset write, a pax header with a fractional time before each member."""
    simple_pool(tmp_path / "pool")
    simple_pool(tmp_path / "pax", mtime=1_700_000_000.25)
    assert sum(path.stat().st_size for path in outputs(tmp_path / "pax")) > sum(
        path.stat().st_size for path in outputs(tmp_path / "pool")
    )
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "one", "-j", 1, "--shuffle") == 0
    monkeypatch.delattr(Sources, "read")
    assert run("-i", tmp_path / "pax", "-o", tmp_path / "two", "-j", 1, "--shuffle") == 0
    assert [path.read_bytes() for path in outputs(tmp_path / "one")] == [
        path.read_bytes() for path in outputs(tmp_path / "two")
    ]


def test_a_large_json_has_its_uid(tmp_path: Path) -> None:
    rows = [[Sample(f"{i:05d}", uid_of(f"large {i}"), more={"exif": "x" * (i * 30_000)}) for i in range(5)]]
    write_pool(tmp_path / "pool", rows, parquet=False)
    subset = write_subset(tmp_path / "s.npy", [sample.uid or "" for sample in rows[0]])
    assert run("-i", tmp_path / "pool", "-s", subset, "-o", tmp_path / "out", "-j", 1) == 0
    assert [members for path in outputs(tmp_path / "out") for _, members in read_tar(path)] == [
        sample.members for sample in rows[0]
    ]


def test_finish_before_all_parts_is_an_error(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--shard-size", 20]
    assert run(*common, "--part", "1/2") == 0
    with pytest.raises(ReshardError, match=r"1 of 3 output shards are not complete, first 00000001\.tar"):
        run(*common, "--finish")


@pytest.mark.parametrize("size", [3000, 12_000, 10**9])
def test_shards_by_bytes(tmp_path: Path, size: int) -> None:
    simple_pool(tmp_path / "pool", 3, 20)
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--shard-bytes", size) == 0
    sizes = [path.stat().st_size for path in outputs(tmp_path / "out")]
    single = {path for path in outputs(tmp_path / "out") if len(read_tar(path)) == 1}
    assert all(path in single or path.stat().st_size <= size for path in outputs(tmp_path / "out"))
    assert size < 10**9 or len(sizes) == 1
    assert sum(len(read_tar(path)) for path in outputs(tmp_path / "out")) == 60


def test_subset_as_text_and_parquet(tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool")
    uids = [shards[0][1].uid, shards[2][4].uid, uid_of("absent"), "no hexadecimal number"]
    (tmp_path / "s.txt").write_text("\n".join(map(str, uids)) + "\n\n")
    pq.write_table(pa.table({"uid": uids}), tmp_path / "s.parquet")
    for name in ("s.txt", "s.parquet"):
        out = tmp_path / f"out-{name}"
        assert run("-i", tmp_path / "pool", "-s", tmp_path / name, "-o", out, "-j", 1) == 1
        assert {*(out / "missing_uids.txt").read_text().splitlines()} == set(map(str, uids[2:]))
        assert [members for _, members in read_tar(outputs(out)[0])] == [shards[0][1].members, shards[2][4].members]
        assert run("-i", tmp_path / "pool", "-s", tmp_path / name, "-o", out, "-j", 1, "--allow-missing") == 0


def test_predicate(tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool", parquet=False)
    for number, samples in enumerate(shards):
        table = {
            "key": [*[s.key for s in samples][::-1], "a failed download"],
            "score": [*[i if i else None for i in range(len(samples))][::-1], 99],
            "text": [*[f"T{i % 3}" for i in range(len(samples))][::-1], None],
        }
        pq.write_table(pa.table(table), tmp_path / f"pool/{number:05d}.parquet")
    for text, holds in {
        "score > 15": lambda i: i > 15,
        "3 < score <= 7 and text in ('T0', 'T1')": lambda i: 3 < i <= 7 and i % 3 < 2,
        "score / 2 == 2.5 or score is None": lambda i: i in (0, 5),
        "not (score < 18) and len(text) == 2 and min(score, 18) >= 18": lambda i: i >= 18,
    }.items():
        out = tmp_path / uid_of(text)
        assert run("-i", tmp_path / "pool", "-o", out, "-j", 1, "--where", text) == 0
        expected = [s.members for samples in shards for i, s in enumerate(samples) if holds(i)]
        assert [members for path in outputs(out) for _, members in read_tar(path)] == expected, text
        assert totals(out)["not_selected"] == 60 - len(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"score > {10**30}", "too large"),
        ("score in [1, 'a']", "Could not convert"),
        ("caption == '\\ud800'", "surrogates not allowed"),
        ("score > __import__('os').system('touch x')", "not understood"),
        ("score.real > 1", "not understood"),
        ("score >", "invalid syntax"),
        ("1 > 0", "names no column"),
        ("nothing > 0", "no column nothing"),
        ("key", "not true or false"),
        ("key > 1", "--where"),
    ],
)
def test_a_predicate_that_cannot_be_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    simple_pool(tmp_path / "pool")
    with pytest.raises(ReshardError, match=message):
        run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--where", text)


def test_members_read_back_by_webdataset(tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool")
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--verify") == 0
    theirs = list(webdataset.WebDataset(str(outputs(tmp_path / "out")[0]), shardshuffle=False))
    assert [{k: v for k, v in row.items() if k[0] != "_"} for row in theirs] == [
        s.members for row in shards for s in row
    ]
    assert [row["__key__"] for row in theirs] == [f"{0:08d}{number:04d}" for number in range(60)]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-j", 1, "--shard-size", 7]
    assert run(*common, "-o", tmp_path / "out", "--dry-run", "--json", tmp_path / "dry.json") == 0
    assert not (tmp_path / "out").exists()
    dry = json.loads((tmp_path / "dry.json").read_bytes())
    assert run(*common, "-o", tmp_path / "out") == 0
    assert dry["output_shards"] == len(outputs(tmp_path / "out"))
    assert dry["output_bytes"] == sum(path.stat().st_size for path in outputs(tmp_path / "out"))
    assert "seconds estimated" in capsys.readouterr().out


def test_output_trains(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
    from data_helpers import make_loader, take
    from PIL import Image

    from neuclip_scale.data.manifest import Manifest, build_manifest
    from neuclip_scale.data.shards import write_shard

    def jpeg(number: int) -> bytes:
        path = tmp_path / "x.jpg"
        Image.new("RGB", (20, 24), (number, 255 - number, 9)).save(path)
        return path.read_bytes()

    (tmp_path / "pool").mkdir()
    for shard in range(2):
        rows = [(f"{shard:05d}{i:04d}", 20 * shard + i) for i in range(20)]
        samples = [{"__key__": key, "jpg": jpeg(n), "txt": str(n), "json": {"uid": uid_of(str(n))}} for key, n in rows]
        write_shard(tmp_path / f"pool/{shard:05d}.tar", samples)
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--shuffle", "--shard-size", 11) == 0
    manifest = Manifest.load(tmp_path / "out/manifest.json")
    assert manifest == build_manifest([str(path) for path in outputs(tmp_path / "out")])
    assert manifest.num_samples == 40
    batches = take(make_loader(manifest, shuffle_window=7), 3)
    assert len(batches) == 3


def test_the_manifest_of_an_output_given_relative_to_here_moves_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuclip_scale.data.manifest import Manifest

    simple_pool(tmp_path / "pool", 1)
    monkeypatch.chdir(tmp_path)
    assert run("-i", "pool", "-o", "out", "-j", 1) == 0
    for name in ("out", "moved"):
        paths = [shard.path for shard in Manifest.load(tmp_path / name / "manifest.json").shards]
        assert paths == list(map(str, outputs(tmp_path / name)))
        if name == "out":
            (tmp_path / "out").rename(tmp_path / "moved")


def test_importing_it_loads_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, neuclip_scale.reshard as r\n"
        "[importlib.import_module(f'{r.__name__}.{m.name}') for m in pkgutil.iter_modules(r.__path__)]\n"
        "import neuclip_scale.commands.reshard\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
