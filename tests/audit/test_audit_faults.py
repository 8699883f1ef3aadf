"""What is damaged or hostile is told with field, value and remedy; what is interrupted goes on."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_worlds import Shard, uid_of, url_of, write_download, write_published
from s3_server import s3_bucket

from neuclip_scale.audit import auditing, pictures, scanning
from neuclip_scale.commands.audit import main
from neuclip_scale.data.shards import ShardIndex, index_shard
from neuclip_scale.queries.engines import Engine, EngineOptions


def audit(folder: Path, *more: object, download: str = "d") -> int:
    arguments = ["--manifest", folder / "list.parquet", "--download", folder / download, "--output", folder / "out"]
    return main([*map(str, arguments), "-j", "1", *map(str, more)])


def document(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out/audit.json").read_bytes()))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_published(tmp_path / "list.parquet", list(range(40)))
    whole = [Shard([(n, None) for n in part], [(n, None) for n in part]) for part in (range(20), range(20, 40))]
    write_download(tmp_path / "d", whole)
    return tmp_path


def test_a_whole_download_has_no_discrepancy(world: Path) -> None:
    assert audit(world) == 0
    assert document(world)["findings"] == []


def test_thresholds_decide_what_a_discrepancy_is(world: Path) -> None:
    write_published(world / "list.parquet", list(range(50)))
    assert audit(world) == 1
    assert audit(world, "--max-missing", "0.2") == 0
    assert audit(world, "--max-missing", "0.19") == 1


def test_a_tar_that_was_cut(world: Path) -> None:
    tar = world / "d/00001.tar"
    tar.write_bytes(tar.read_bytes()[: 10 * 3 * 1024 + 700])
    assert audit(world) == 1
    (part,) = document(world)["downloads"]
    assert [row["shard"] for row in part["damaged_shards"]] == ["00001"]
    assert part["damaged_shards"][0]["fault"].startswith("tar: damaged at byte 30720")
    assert {name: reason["count"] for name, reason in part["reasons"].items()} == {"damaged_shard": 10}


@pytest.mark.parametrize("damage", ["cut", "wrong columns", "no parquet", "empty"])
def test_a_parquet_that_cannot_be_read(world: Path, damage: str) -> None:
    path = world / "d/00001.parquet"
    if damage == "wrong columns":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:-40], "no parquet": b"<html>", "empty": b""}[damage])
    assert audit(world) == 1
    found = document(world)
    assert found["counts"]["attempted"] == 20
    assert found["counts"]["in_tars"] == 40
    (row,) = found["downloads"][0]["damaged_shards"]
    assert row["fault"].startswith("parquet: 00001.parquet: ")


def test_bytes_that_are_no_text(world: Path) -> None:
    columns = {
        "uid": [uid_of(n).encode() for n in range(20, 40)],
        "url": [url_of(n).encode() + b"\xff" for n in range(20, 40)],
        "key": [b"%09d" % n for n in range(20)],
        "status": pa.array(["success"] * 20).dictionary_encode(),
        "error_message": pa.nulls(20),
    }
    pq.write_table(pa.table(columns), world / "d/00001.parquet")
    assert audit(world) == 0
    assert document(world)["counts"]["downloaded"] == 40


def test_names_that_are_no_text(world: Path) -> None:
    with tarfile.open(world / "d/00001.tar", "w") as tar:
        for place, data in enumerate((b'{"uid": "\\ud800"}', b'{"uid": 1e999}', b"{" * 5000, b"")):
            for extension, content in (("jpg", b"picture"), ("json", data)):
                info = tarfile.TarInfo(f"b\udcff{place}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (world / "d/00001.parquet").unlink()
    assert audit(world) == 1
    counts = document(world)["counts"]
    assert (counts["in_tars"], counts["corrupt"], counts["orphaned"]) == (24, 2, 4)


def test_a_shard_that_was_made_readable_is_read_anew(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = world / "d/00001.tar"

    def refuse(path: Path) -> ShardIndex:
        if path == tar:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return index_shard(path)

    monkeypatch.setattr(scanning, "index_shard", refuse)  # root may read everything
    assert audit(world) == 1
    assert document(world)["downloads"][0]["damaged_shards"] == [{"shard": "00001", "fault": "tar: Permission denied"}]
    monkeypatch.undo()
    tar.chmod(0o444)
    assert audit(world) == 0


def test_a_tar_that_fails_while_pictures_are_decoded(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> ShardIndex:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(pictures, "index_shard", fail)
    assert audit(world, "--deep") == 2
    assert "--deep: 00000.tar: Input/output error. Mend that" in capsys.readouterr().err
    monkeypatch.undo()
    assert audit(world, "--deep") == 1
    assert document(world)["counts"]["corrupt"] == 40  # these tars hold words


def test_files_whose_names_are_no_text(world: Path) -> None:
    folder = os.fsencode(world) + b"/\xff"
    os.rename(world / "d", folder)
    for extension in (b".tar", b".parquet", b"_stats.json"):
        os.rename(folder + b"/00001" + extension, folder + b"/\xfe" + extension)
    assert audit(world, download="\udcff") == 1
    (part,) = document(world)["downloads"]
    assert part["counts"]["in_tars"] == 40
    assert part["path"].endswith(r"/\udcff")
    # No parquet can be opened there, which is told.
    assert [row["shard"] for row in part["damaged_shards"]] == ["00000", r"\udcfe"]


def test_keys_that_are_uids_are_told_by_the_json_too(world: Path) -> None:
    (world / "d/00001.parquet").unlink()
    with tarfile.open(world / "d/00001.tar", "w") as tar:
        for number in range(20, 40):
            for extension, data in (("jpg", b"picture"), ("json", json.dumps({"uid": uid_of(number)}).encode())):
                info = tarfile.TarInfo(f"{uid_of(number)}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert audit(world) == 0
    assert not any("known by their keys" in note for note in document(world)["notes"])


def test_links_and_paths_in_a_tar_are_no_samples(world: Path) -> None:
    with tarfile.open(world / "d/00001.tar", "w") as tar:
        link = tarfile.TarInfo("000000001.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("/etc/000000002.jpg", "../000000003.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert audit(world) == 1
    found = document(world)
    assert found["counts"]["in_tars"] == 20
    assert "links" in found["downloads"][0]["damaged_shards"][0]["fault"]


@pytest.mark.parametrize("damage", ["cut", "columns", "none", "two lists"])
def test_a_list_that_cannot_be_used(world: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = world / "list.parquet"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "columns":
        pq.write_table(pa.table({"picture": [1]}), path)
    elif damage == "none":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
        write_published(path / "a.parquet", [1])
        pq.write_table(pa.table({"uid": ["x"]}), path / "b.parquet")
    expected = {"cut": "Fetch it again", "columns": "neither a column uid nor url", "none": "no parquet"}
    assert audit(world) == 2
    assert expected.get(damage, "other columns") in capsys.readouterr().err


def test_a_quotation_mark_that_is_never_closed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f'{uid_of(n)},{url_of(n)},"caption, {n}"' for n in range(40)]
    path = world / "list.csv"
    path.write_text("\n".join(["uid,url,text", *rows]))
    assert audit(world, "--manifest", path) == 0
    path.write_text(path.read_text().replace('caption, 39"', "caption, 39"))
    assert audit(world, "--manifest", path) == 2
    assert f"{path} line 41: unexpected end of data. Close every quotation mark" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-missing", "3"], "--max-missing 3.0: give a share"),
        (["--samples-seen", "0"], "--samples-seen 0"),
        (["--num-threads", "-1"], "--num-threads -1: give a number of threads"),
        (["--memory-limit", "much"], "--memory-limit 'much'"),
        (["--spark-conf", "x"], "--spark-conf 'x'"),
        (["--subset-file", "/nowhere"], "--subset-file /nowhere: there is no such file"),
        (["-j", "-3"], "-j -3"),
        (["--gain", "nan", "--download", "other"], "not all finite"),
        (["--gain", "1", "--first-scores", "3", "--second-scores", "1", "--download", "o"], "differ by 2.00"),
        (["--gain", "1"], "Give --download twice"),
        (["--memory-limit", "1MB"], "--memory-limit"),
    ],
)
def test_bad_usage(world: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(world, *more) == 2
    assert message in capsys.readouterr().err


def test_files_of_a_list_with_other_types(world: Path) -> None:
    """As pandas writes a column that has no fraction in one file, and some in the next."""
    rows = pq.read_table(world / "list.parquet")
    (world / "list").mkdir()
    parts = {"0": (rows.slice(0, 10), list(range(10))), "1": (rows.slice(10), [n / 4 for n in range(10, 40)])}
    for name, (part, numbers) in parts.items():
        pq.write_table(part.append_column("number", pa.array(numbers)), world / "list" / f"{name}.parquet")
    for name in ("00001.tar", "00001.parquet"):
        (world / "d" / name).unlink()
    assert audit(world, "--manifest", world / "list") == 1
    found = {each["column"]: each for each in document(world)["downloads"][0]["bias"]["numbers"]}
    assert found["number"]["missing"]["mean"] == sum(n / 4 for n in range(20, 40)) / 20


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [("Out of Memory Error: 1 GiB", "Give more"), ("IO Error: No space left on device", "Make room there")],
)
def test_what_an_engine_lacks_is_told(
    world: Path, reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise duckdb.Error(reason)

    monkeypatch.setattr(auditing, "measure_bias", fail)
    assert audit(world) == 2
    assert f"{reason}. {remedy}" in capsys.readouterr().err


def test_s3_is_the_same_as_a_folder(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_published(world / "list.parquet", list(range(43)))
    assert audit(world) == 1
    expected = document(world)
    with s3_bucket(world, "pool/world", world / "log") as address:
        arguments = ["--manifest", address.format(name="/list.parquet"), "--download", address.format(name="/d")]
        arguments += ["--output", str(world / "remote"), "-j", "2"]
        assert main(arguments) == 1
        found = json.loads((world / "remote/audit.json").read_bytes())
        assert found["digest"] == expected["digest"]
        assert not list((world / "remote/cache/download-0/fetched").iterdir())
        assert main([*arguments, "--deep"]) == 2
        assert "Copy it first" in capsys.readouterr().err
        assert main(["--manifest", arguments[1], "--download", address.format(name="/void"), *arguments[4:]]) == 2
        assert "error: --download s3://" in capsys.readouterr().err


def test_a_download_that_is_not_there(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(world, download="elsewhere") == 2
    assert "there is no such folder" in capsys.readouterr().err
    (world / "void").mkdir()
    assert audit(world, download="void") == 2
    assert "neither .tar nor .parquet" in capsys.readouterr().err


def test_what_was_killed_goes_on_and_what_changed_is_read_anew(world: Path) -> None:
    command = [sys.executable, "-m", "neuclip_scale", "audit", "--manifest", world / "list.parquet"]
    command += ["--download", world / "d", "--output", world / "out", "-j", "1"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = world / "out/cache/download-0/shards"
    while process.poll() is None and not (done.is_dir() and any(done.glob("*.json"))):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in done.glob("*.json")}
    assert kept
    assert audit(world) == 0
    assert all((done / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())
    assert len(list(done.glob("*.json"))) == 2

    write_download(world / "d", [Shard([(n, None) for n in range(20)], [(n, None) for n in range(7)])])
    os.utime(world / "d/00000.tar", (1, 1))
    assert audit(world) == 1
    assert document(world)["counts"]["missing"] == 13


def test_what_a_killed_engine_spilled_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from neuclip_scale.queries.engines import *; "
    code += "engine = Engine(EngineOptions(), Path(sys.argv[1])); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    (killed,) = tmp_path.glob(".scratch-*")
    with Engine(EngineOptions(), tmp_path):
        (living,) = tmp_path.glob(".scratch-*")
        assert living != killed
        with Engine(EngineOptions(), tmp_path):
            assert living.exists()
    assert not list(tmp_path.glob(".scratch-*"))


def test_unreadable_parquets_leave_open_who_was_attempted(world: Path) -> None:
    write_published(world / "list.parquet", list(range(45)))
    (world / "d/00001.parquet").write_bytes(b"<html>")
    assert audit(world) == 1
    found = document(world)
    assert found["counts"]["never_attempted"] is None
    assert {name: reason["count"] for name, reason in found["downloads"][0]["reasons"].items()} == {"unknown": 5}


def test_lists_of_an_earlier_audit_are_removed_and_no_other_file(world: Path) -> None:
    write_download(world / "e", [Shard([(n, None) for n in range(9)], [(n, None) for n in range(9)])])
    assert audit(world, "--download", world / "e") == 1
    (world / "out/lists/mine.npy").write_bytes(b"")
    (world / "out/scratch").mkdir()
    assert (world / "out/lists/common.npy").exists()
    assert audit(world) == 0
    assert not (world / "out/lists/common.npy").exists()
    assert not (world / "out/lists/e/missing.npy").exists()
    assert (world / "out/lists/mine.npy").exists()
    assert (world / "out/scratch").is_dir()
    assert not list((world / "out/cache").glob(".scratch-*"))


def test_folders_with_signs_of_patterns_and_columns(world: Path) -> None:
    for name in ("status=failed", "a [b] *?{x} 'ü' \"q\""):
        folder = world / name
        write_published(folder / "list.parquet", list(range(12)))
        errors = [None, "timed out"]
        write_download(
            folder / "d", [Shard([(n, errors[n % 2]) for n in range(12)], [(n, None) for n in range(0, 12, 2)])]
        )
        assert audit(folder) == 1
        assert document(folder)["counts"]["failed"] == 6


def test_rows_and_samples_without_identity_are_told(world: Path) -> None:
    rows = pq.read_table(world / "list.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "uid": None}]), world / "list.parquet")
    with tarfile.open(world / "d/00002.tar", "w") as tar:
        info = tarfile.TarInfo("somebody.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert audit(world) == 1
    found = document(world)
    assert found["counts"]["orphaned"] == 1
    assert any(note.startswith("1 row(s) of the list have no uid") for note in found["notes"])
    assert any("known by their keys only" in note for note in found["notes"])
