"""Every picture decoded and hashed: what is found, what hostile files do, and going on after an interruption."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from planted_pictures import jpeg, picture, png, rewrapped
from planted_world import PlantedWorld

from neuclip_scale.audit.errors import AuditError
from neuclip_scale.audit.looks import look_of
from neuclip_scale.audit.pictures import DeepScan, deep_scan, scan_pictures
from neuclip_scale.data.decoding import decode_image
from neuclip_scale.data.shards import write_shard

UID = "0123456789abcdef0123456789abcdef"


def rows_of(scan: DeepScan) -> list[dict[str, Any]]:
    return [row for file in scan.files for row in pq.read_table(file).to_pylist()]


def sample(key: str, image: bytes, extension: str = "jpg", **told: Any) -> dict[str, Any]:
    return {"__key__": key, extension: image, "txt": f"caption of {key}", "json": told}


def big_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than a machine has memory for."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def scan_one(folder: Path, samples: list[dict[str, Any]]) -> tuple[DeepScan, dict[str, dict[str, Any]]]:
    write_shard(folder / "pool" / "00000.tar", samples)
    scan = deep_scan(folder / "pool", folder / "deep", 1)
    return scan, {row["key"]: row for row in rows_of(scan)}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    (tmp_path / "pool").mkdir()
    return tmp_path


def test_a_real_download_is_hashed_as_tarfile_and_imagehash_do_it(two_downloads: PlantedWorld, tmp_path: Path) -> None:
    scan = deep_scan(two_downloads.first.folder, tmp_path, 2)
    rows = {(row["shard"], row["key"]): row for row in rows_of(scan)}
    expected = 0
    for path in sorted(two_downloads.first.folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                row, data = rows[path.stem, stem], tar.extractfile(member).read()
                if extension == "json":
                    told = json.loads(data)
                    for name in ("uid", "sha256", "original_width", "original_height", "width", "height"):
                        assert row[name] == told[name]
                elif extension == "jpg":
                    expected += 1
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    assert row["tar_sha256"] == hashlib.sha256(data).hexdigest()
                    assert row["num_bytes"] == len(data)
                    for name in ("phash", "dhash"):
                        whole = int(str(getattr(imagehash, name)(image)), 16)
                        assert row[name] % (1 << 64) == whole
                    means = np.asarray(image).reshape(-1, 3).mean(axis=0)
                    assert np.abs(means - [row["red"], row["green"], row["blue"]]).max() <= 0.5
                    assert row["decodes"] is True
                    assert row["fault"] is None
    assert scan.num_samples == expected == len(rows)
    assert scan.num_undecodable == 0
    planted = {sample.uid for sample in two_downloads.samples if two_downloads.first.fates.arrives(sample.uid)}
    assert {row["uid"] for row in rows.values()} == planted


def test_equal_pixels_have_one_pixel_hash_and_others_do_not() -> None:
    data = jpeg(picture(1))
    look, same = (look_of(decode_image(each, 1 << 20)) for each in (data, rewrapped(data)))
    assert look == same
    tall, wide = (look_of(Image.new("RGB", size, (9, 9, 9))) for size in ((20, 30), (30, 20)))
    assert tall.pixel_hash != wide.pixel_hash
    assert look_of(decode_image(jpeg(picture(1), 91), 1 << 20)).pixel_hash != look.pixel_hash


def test_uids_come_from_the_json_then_the_parquet_then_the_key(pool: Path) -> None:
    image = png(picture(3))
    table = {"key": ["a", "b", "c", "d"], "uid": [UID[::-1], "F" * 32, None, "dddd"]}
    pq.write_table(pa.table(table), pool / "pool" / "00000.parquet")
    samples = [sample("a", image, "png", uid=UID.upper()), *(sample(key, image, "png") for key in "bcd")]
    _, rows = scan_one(pool, samples)
    assert {key: row["uid"] for key, row in rows.items()} == {"a": UID, "b": "f" * 32, "c": "c", "d": "dddd"}


def test_every_hostile_picture_is_a_row_with_its_fault(pool: Path) -> None:
    whole = jpeg(picture(4))
    hostile = {
        "bomb": (big_png(50_000, 50_000), "pixels) exceeds limit"),
        "truncated": (whole[: len(whole) // 2], "truncated"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not a picture"),
        "html": (b"<!DOCTYPE html><html></html>", "not a picture"),
        "empty": (b"", "not a picture"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        "noise": (whole[:30] + os.urandom(999), ""),
    }
    samples = [sample(key, data) for key, (data, _) in hostile.items()] + [sample("good", whole)]
    samples.append({"__key__": "bare", "txt": "no picture", "json": {}})
    samples.append({"__key__": "nested", "jpg": whole, "json": b"[" * 100_000})
    samples.append({"__key__": "list", "jpg": whole, "json": b"[1]"})
    scan, rows = scan_one(pool, samples)
    for key, (_, fault) in hostile.items():
        assert rows[key]["decodes"] is False
        assert fault in rows[key]["fault"], rows[key]
        assert rows[key]["pixel_hash"] is None
        assert rows[key]["tar_sha256"] == hashlib.sha256(hostile[key][0]).hexdigest()
    assert "no picture" in rows["bare"]["fault"]
    assert "json cannot be read" in rows["nested"]["fault"]
    assert "a list, not an object" in rows["list"]["fault"]
    assert [rows[key]["decodes"] for key in ("good", "nested", "list")] == [True] * 3
    assert scan.num_undecodable == len(hostile) + 1
    assert scan.shards[0].fault == ""


def test_json_of_odd_values_gives_rows_that_can_be_written(pool: Path) -> None:
    odd = b'{"uid": "\\ud800x", "sha256": 5, "original_width": true, "original_height": 99999999999999999999}'
    _, rows = scan_one(pool, [{"__key__": "a", "jpg": jpeg(picture(1)), "json": odd}])
    assert rows["a"]["uid"] == "?x"
    assert [rows["a"][name] for name in ("sha256", "original_width", "original_height")] == [None] * 3


def test_a_tar_of_links_absolute_paths_and_odd_names_gives_only_its_files(pool: Path) -> None:
    data = jpeg(picture(1))
    with tarfile.open(pool / "pool" / "00000.tar", "w") as tar:
        for name in ("/etc/abs.jpg", "../up.jpg", "good.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        member = tarfile.TarInfo("b\udcff.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    scan = deep_scan(pool / "pool", pool / "deep", 1)
    assert [row["key"] for row in rows_of(scan)] == ["good", "b?"]
    assert "3 member(s) ignored" in scan.shards[0].fault


def test_damaged_shards_are_told_and_the_others_are_read(pool: Path) -> None:
    for name in ("00000", "00001", "00003"):
        write_shard(pool / "pool" / f"{name}.tar", [sample(f"{name}{i}", jpeg(picture(i))) for i in range(4)])
    cut = pool / "pool" / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:-12_000])
    (pool / "pool" / "00002.tar").write_bytes(os.urandom(4096))
    (pool / "pool" / "00003.parquet").write_bytes(b"PAR1 not really")
    (pool / "pool" / "00004.tar").mkdir()
    scan = deep_scan(pool / "pool", pool / "deep", 2)
    assert [(shard.name, shard.num_samples > 0, bool(shard.fault)) for shard in scan.shards] == [
        ("00000", True, False),
        ("00001", True, True),
        ("00002", False, True),
        ("00003", True, False),
    ]
    assert len(rows_of(scan)) == scan.num_samples


@pytest.mark.parametrize("columns", [{"a": [1]}, {"key": [1, 1], "uid": [[1], [2]]}, {"key": ["a"], "uid": [5]}])
def test_a_parquet_of_another_schema_gives_no_uids(pool: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), pool / "pool" / "00000.parquet")
    _, rows = scan_one(pool, [sample(key, jpeg(picture(1))) for key in "bc"])
    assert {row["uid"] for row in rows.values()} == {"b", "c"}


def test_a_second_run_takes_over_what_did_not_change(pool: Path) -> None:
    for name in ("00000", "00001", "00002"):
        write_shard(pool / "pool" / f"{name}.tar", [sample("a", jpeg(picture(1)))])
    first = deep_scan(pool / "pool", pool / "deep", 1)
    written = [file.stat().st_mtime_ns for file in first.files]
    first.files[1].write_bytes(first.files[1].read_bytes()[:100])  # as a kill of another program may leave it
    write_shard(pool / "pool" / "00002.tar", [sample("b", jpeg(picture(2)))])
    seen = []
    second = deep_scan(pool / "pool", pool / "deep", 1, seen.append)
    assert [shard.name for shard in seen] == ["00000", "00001", "00002"]
    assert [old == file.stat().st_mtime_ns for old, file in zip(written, second.files)] == [True, False, False]
    assert [row["key"] for row in rows_of(second)] == ["a", "a", "b"]
    (pool / "pool" / "00000.tar").unlink()
    deep_scan(pool / "pool", pool / "deep", 1)
    assert sorted(path.name for path in (pool / "deep").iterdir()) == ["00001.parquet", "00002.parquet"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells how much memory was used")
def test_a_bomb_costs_no_memory(pool: Path) -> None:
    samples = [sample(f"{side}", big_png(side, side)) for side in (7_100, 50_000, 65_000)]
    write_shard(pool / "pool" / "00000.tar", samples)
    code = (
        "import re, sys; from pathlib import Path; from neuclip_scale.audit.pictures import deep_scan\n"
        "scan = deep_scan(Path(sys.argv[1]), Path(sys.argv[2]), 1)\n"
        "print(scan.num_undecodable, int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pool / "pool", pool / "deep"], capture_output=True, text=True, check=True
    )
    undecodable, megabytes = map(int, done.stdout.split())
    assert undecodable == 3
    assert megabytes < 400


def test_what_cannot_be_scanned_is_named(pool: Path) -> None:
    with pytest.raises(AuditError, match=r"pool holds no \.tar"):
        deep_scan(pool / "pool", pool / "deep", 1)
    write_shard(pool / "pool" / "00000.tar", [sample("a", jpeg(picture(1)))])
    (pool / "file").touch()
    with pytest.raises(AuditError, match="goes on"):
        deep_scan(pool / "pool", pool / "file" / "deep", 1)
    tar = pool / "pool" / "00000.tar"
    with pytest.raises(AuditError, match="two shards have one name"):
        scan_pictures([("a/0", tar), ("a_0", tar)], pool / "deep", 1)
