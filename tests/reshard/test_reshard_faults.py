"""Full disks, foreign files, hostile and damaged shards: nothing is lost, overwritten or silently skipped."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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
    write_tar,
)

from neuclip_scale.data.shards import index_shard
from neuclip_scale.reshard import DiskFullError, ReshardError
from neuclip_scale.reshard.journal import Journal


def report(folder: Path) -> dict:
    return dict(json.loads((folder / "reshard.json").read_bytes()))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Interruptions


def test_a_full_disk_is_told_and_goes_on(tmp_path: Path) -> None:
    shards = [[Sample(f"{s:05d}{i:04d}", uid_of(f"{s}/{i}"), 20_000 * (s + 1)) for i in range(10)] for s in range(3)]
    write_pool(tmp_path / "pool", shards)
    common = ["-i", tmp_path / "pool", "--shard-size", 10, "-j", 1]
    limit = 450_000  # bytes of a file: the first two outputs fit, the third does not

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status, text = finished(start(*common, "-o", tmp_path / "out", preexec_fn=limited))
    assert status == 1
    assert "run the same command again" in text
    assert "Traceback" not in text
    assert len(outputs(tmp_path / "out")) == 2
    before = [path.stat().st_mtime_ns for path in outputs(tmp_path / "out")]
    assert run(*common, "-o", tmp_path / "out") == 0
    assert [path.stat().st_mtime_ns for path in outputs(tmp_path / "out")][:2] == before
    assert run(*common, "-o", tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_takes_half_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC as the kernel gives it: a short write first, the error with the next."""
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1]

    write = os.pwrite
    room = [3000]

    def fills_up(descriptor: int, data: memoryview, offset: int) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken = write(descriptor, data[: room[0]], offset)
        room[0] -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fills_up)
        with pytest.raises(DiskFullError, match="No space left"):
            run(*common)
    with monkeypatch.context() as patch:  # a slow disk that takes a part each time is no error
        patch.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:1000], offset))
        assert run(*common, "--verify") == 0


@pytest.mark.parametrize("more", [[], ["--resize", 8]], ids=["renamed in place", "one by one"])
def test_a_disk_that_changes_a_byte_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[object]
) -> None:
    simple_pool(tmp_path / "pool")
    write = os.pwrite

    def changes(descriptor: int, data: memoryview, offset: int) -> int:
        return write(descriptor, bytes(data[:-1]) + bytes([data[-1] ^ 1]), offset)

    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, *more]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", changes)
        with pytest.raises(ReshardError, match="read back otherwise than written"):
            run(*common)
    assert not outputs(tmp_path / "out")
    assert run(*common) == (1 if more else 0)  # these pictures are noise, and cannot be resized


def test_a_torn_journal_line_is_dropped(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--shard-size", 20]
    assert run(*common) == 0
    whole = contents(tmp_path / "out")
    journal = tmp_path / "out/.reshard/journal-1of1.jsonl"
    first, second, third = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + second + third[:40])
    (tmp_path / "out/00000002.tar").unlink()
    assert run(*common) == 0
    assert contents(tmp_path / "out") == whole


def test_two_processes_at_one_part(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1]
    assert run(*common, "--plan-only") == 0
    digest = json.loads((tmp_path / "out/.reshard/plan.json").read_bytes())["digest"]
    with Journal(tmp_path / "out", digest, "1of1"), pytest.raises(ReshardError, match="another process"):
        run(*common)


# Folders


def test_what_was_not_written_here_stays(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    common = ["-i", tmp_path / "pool", "-o", out, "-j", 1, "--shard-size", 20]
    with pytest.raises(ReshardError, match=r"not empty.*mine\.txt"):
        run(*common)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert run(*common, "--plan-only") == 0
    (out / "00000001.tar").write_text("mine")
    with pytest.raises(ReshardError, match=r"00000001\.tar: stands where an output belongs"):
        run(*common)
    assert (out / "00000001.tar").read_text() == "mine"
    (out / "00000001.tar").unlink()
    (out / "sizes.json").write_text("mine")
    with pytest.raises(ReshardError, match=r"sizes\.json: was not written here"):
        run(*common)
    assert (out / "sizes.json").read_text() == "mine"
    (out / "sizes.json").unlink()
    assert run(*common) == 0
    with pytest.raises(ReshardError, match="another shuffle_seed: None, not 0"):
        run(*common, "--shuffle")


def test_a_changed_output_is_told_and_verify_sees_every_byte(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1]
    assert run(*common) == 0
    path = outputs(tmp_path / "out")[0]
    data = bytearray(path.read_bytes())
    data[index_shard(path).members(30)["jpg"].offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReshardError, match="does not hold what was written"):
        run(*common, "--verify")
    path.write_bytes(data[:-512])
    with pytest.raises(ReshardError, match="was changed since it was written"):
        run(*common)
    path.unlink()
    assert run(*common, "--verify") == 0


def test_a_changed_input_is_told(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    common = ["-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1]
    assert run(*common, "--plan-only") == 0
    os.utime(tmp_path / "pool/00001.tar", (1, 1))
    with pytest.raises(ReshardError, match="another pool"):
        run(*common)


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_no_input(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReshardError, match="--input-dir"):
        run("-i", tmp_path / folder, "-o", tmp_path / "out", "-j", 1)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    simple_pool(tmp_path / "pool")
    blocked = tmp_path / "file"
    blocked.write_text("")
    status, text = finished(start("-i", tmp_path / "pool", "-o", blocked / "out", "-j", 1))
    assert status == 1
    assert "Traceback" not in text
    assert "file" in text
    status, text = finished(start("-i", tmp_path / "pool", "-o", "/proc/reshard", "-j", 1))
    assert status == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shard-size", 5, "--shard-bytes", 5000], "--shard-size 5, --shard-bytes 5000"),
        (["-s", "a.npy", "--where", "score > 1"], "--subset-file and --where"),
        (["--part", "3/2"], "--part '3/2'"),
        (["--encode", "gif"], "--encode 'gif'"),
    ],
)
def test_bad_usage_is_told_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], told: str
) -> None:
    simple_pool(tmp_path / "pool")
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", *arguments) == 2
    assert f"error: {told}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Damage


def test_hostile_members_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    good = Sample("000000001", uid_of("good"))
    with tarfile.open(tmp_path / "pool/00000.tar", "w") as archive:
        for name, kind, target in [
            ("000000000.jpg", tarfile.SYMTYPE, str(secret)),
            ("000000000.txt", tarfile.LNKTYPE, "../../secret"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        for name in (f"{tmp_path}/evil.jpg", "../evil.jpg", "a/../../evil.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        for extension, data in good.members.items():
            info = tarfile.TarInfo(f"000000001.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "pool/00001.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--verify") == 0
    assert [read_tar(path) for path in outputs(tmp_path / "out")] == [[("000000000000", good.members)]]
    assert {line["shard"] for line in lines(tmp_path / "out/corrupt.jsonl")} == {"00000.tar", "00001.tar"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pool", "secret"]


def test_damaged_shards_and_members_are_listed(tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool", 4)
    cut = tmp_path / "pool/00001.tar"
    tail = index_shard(cut).members(10)["jpg"].offset + 5
    cut.write_bytes(cut.read_bytes()[:tail])
    broken = tmp_path / "pool/00002.tar"
    data = bytearray(broken.read_bytes())
    span = index_shard(broken).members(3)["json"]
    data[span.offset : span.offset + span.size] = b"x" * span.size
    broken.write_bytes(data)
    (tmp_path / "pool/00003.tar").write_bytes(b"no tar" * 1000)
    subset = write_subset(tmp_path / "s.npy", [s.uid for row in shards for s in row if s.uid])
    common = ["-i", tmp_path / "pool", "-s", subset, "-j", 1, "--shuffle", "--shard-size", 7]
    assert run(*common, "-o", tmp_path / "out", "--verify") == 1
    told = report(tmp_path / "out")["totals"]
    assert (told["found"], told["missing"], told["corrupt"], told["corrupt_shards"]) == (49, 31, 1, 2)
    missing = set((tmp_path / "out/missing_uids.txt").read_text().split())
    lost = shards[1][10:] + shards[2][3:4] + shards[3]
    assert missing == {sample.uid for sample in lost}
    reasons = {(line["shard"], line["key"]): line["reason"] for line in lines(tmp_path / "out/corrupt.jsonl")}
    assert "cut off" in reasons["00001.tar", ""]
    assert "json" in reasons["00002.tar", "000020003"]
    assert "not a plain tar" in reasons["00003.tar", ""]
    written = [members for path in outputs(tmp_path / "out") for _, members in read_tar(path)]
    kept = [s.members for row in shards for s in row if s.uid not in missing]
    assert sorted(map(str, written)) == sorted(map(str, kept))


def test_tars_that_are_not_plain(tmp_path: Path) -> None:
    """Long names, pax paths, folders, GNU headers: the slow road, with the same result."""
    (tmp_path / "pool").mkdir()
    rows = [(f"{'k' * 110}{i:02d}", {"jpg": bytes([i]) * i * 99, "txt": b"t"}) for i in range(9)]
    write_tar(tmp_path / "pool/0.tar", rows, format=tarfile.GNU_FORMAT)
    more = [(f"pax/{'ü' * 60}{i:02d}", {"jpg": bytes([i]) * i * 77, "json": b'{"uid": null}'}) for i in range(9)]
    write_tar(tmp_path / "pool/1.tar", more, mtime=1.5)
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--shuffle", "--verify") == 0
    found = [members for path in outputs(tmp_path / "out") for _, members in read_tar(path)]
    assert sorted(map(str, found)) == sorted(str(members) for _, members in rows + more)


def test_a_parquet_that_lies_is_not_believed(tmp_path: Path) -> None:
    shards = simple_pool(tmp_path / "pool", 2)
    keys = [sample.key for sample in shards[0]]
    pq.write_table(pa.table({"key": keys, "uid": [uid_of("lie")] * 20}), tmp_path / "pool/00000.parquet")
    pq.write_table(pa.table({"key": ["other"], "uid": [uid_of("other")]}), tmp_path / "pool/00001.parquet")
    subset = write_subset(tmp_path / "s.npy", [s.uid for row in shards for s in row if s.uid])
    assert run("-i", tmp_path / "pool", "-s", subset, "-o", tmp_path / "out", "-j", 1) == 0
    told = report(tmp_path / "out")["parquets_not_believed"]
    assert "in the parquet" in told["00000.tar"]
    assert "does not name every key once" in told["00001.tar"]


def test_texts_that_are_no_unicode_end_nothing(tmp_path: Path) -> None:
    """Half a surrogate pair is valid JSON, and a parquet's texts may be any bytes."""
    (tmp_path / "pool").mkdir()
    write_tar(tmp_path / "pool/0.tar", [("0000", {"jpg": b"1", "json": b'{"uid": "\\ud800"}'})])
    write_tar(tmp_path / "pool/1.tar", [("0001", {"jpg": b"2"})])
    bad = pa.array([b"\xff\xfe"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"key": ["0001"], "uid": bad}), tmp_path / "pool/1.parquet")
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--verify") == 0
    assert len(read_tar(outputs(tmp_path / "out")[0])) == 2
    assert "no UTF-8" in report(tmp_path / "out")["parquets_not_believed"]["1.tar"]


def test_without_json_the_parquet_names_uids_and_without_both_the_key(tmp_path: Path) -> None:
    rows = [[Sample(f"{s}{i}", uid_of(f"{s}{i}"), in_json=False) for i in range(5)] for s in range(2)]
    write_pool(tmp_path / "pool", rows)
    (tmp_path / "pool/00001.parquet").unlink()
    (tmp_path / "s.txt").write_text(f"{rows[0][2].uid}\n13\n{rows[1][0].uid}\n")
    assert run("-i", tmp_path / "pool", "-s", tmp_path / "s.txt", "-o", tmp_path / "out", "-j", 1) == 1
    assert [m for _, m in read_tar(outputs(tmp_path / "out")[0])] == [rows[0][2].members, rows[1][3].members]
    assert (tmp_path / "out/missing_uids.txt").read_text().split() == [rows[1][0].uid]


def test_duplicates_are_listed(tmp_path: Path) -> None:
    rows = [[Sample(f"{s}{i}", uid_of(str(i % 3))) for i in range(4)] for s in range(2)]
    write_pool(tmp_path / "pool", rows)
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1) == 0
    assert [(line["shard"], line["key"]) for line in lines(tmp_path / "out/duplicates.jsonl")] == [
        ("00000.tar", "03"),
        *[("00001.tar", f"1{i}") for i in range(4)],
    ]


def test_a_uid_in_capitals_is_the_same_in_json_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    first, second = uid_of("a").upper(), uid_of("b").upper()
    record = json.dumps({"uid": first, "nested": {}}).encode()  # nested: its json is parsed
    write_tar(tmp_path / "pool/0.tar", [("0", {"jpg": b"1", "json": record}), ("1", {"jpg": b"2"})])
    pq.write_table(pa.table({"key": ["0", "1"], "uid": [first, second]}), tmp_path / "pool/0.parquet")
    (tmp_path / "s.txt").write_text(second)
    assert run("-i", tmp_path / "pool", "-s", tmp_path / "s.txt", "-o", tmp_path / "out", "-j", 1) == 0
    assert report(tmp_path / "out")["parquets_not_believed"] == {}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_that_no_header_could_hold_is_listed(tmp_path: Path, layout: int) -> None:
    simple_pool(tmp_path / "pool", 1, parquet=False)
    length = 90 if layout == tarfile.USTAR_FORMAT else 200
    rows = [("a", {"jpg": b"1"}), ("b", {"jpg": b"1", "x" * length: b"2"}), ("c", {"x" * 80: b"3"})]
    write_tar(tmp_path / "pool/1.tar", rows, format=layout)
    assert run("-i", tmp_path / "pool", "-o", tmp_path / "out", "-j", 1, "--verify") == 0
    assert report(tmp_path / "out")["totals"]["written"] == 22
    (line,) = lines(tmp_path / "out/corrupt.jsonl")
    assert (line["shard"], line["key"]) == ("1.tar", "b")
    assert "extension of over 80 bytes" in line["reason"]
