from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.data import shards
from neuclip_scale.data.shards import (
    MemberSpan,
    ShardError,
    expand_shards,
    index_shard,
    read_member,
    write_shard,
)


def sample(number: int, **more: Any) -> dict[str, Any]:
    body = bytes([number]) * (number * 37)
    return {
        "__key__": f"{number:09d}",
        "jpg": body,
        "txt": f"caption ü {number}",
        "json": {"b": 1, "a": 2},
        **more,
    }


def read_all(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    index = index_shard(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [
            (key, {ext: read_member(descriptor, span) for ext, span in index.members(position).items()})
            for position, key in enumerate(index.keys)
        ]
    finally:
        os.close(descriptor)


def write_raw(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)


def regular(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


# Finding


def test_patterns(tmp_path: Path) -> None:
    for name in ("00000.tar", "00001.tar", "00002.tar", "00000.parquet", "x[1].tar"):
        (tmp_path / name).touch()
    three = [str(tmp_path / f"{number:05d}.tar") for number in range(3)]
    assert expand_shards(str(tmp_path / "{00000..00002}.tar")) == three
    assert expand_shards(str(tmp_path / "0*.tar")) == three
    assert expand_shards(f"{tmp_path}/00002.tar::{tmp_path}/0000{{0,1}}.tar::{tmp_path}/00002.tar") == three
    assert expand_shards(str(tmp_path)) == [*three, str(tmp_path / "x[1].tar")]
    assert expand_shards(str(tmp_path / "x[1].tar")) == [str(tmp_path / "x[1].tar")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "empty"),
        ("{here}/{00000..00003}.tar", r"3 of 4 name.*00001\.tar"),
        ("{here}/none*.tar", "none"),
        ("{here}/sub", "sub"),
        ("{here}/{0..2.tar", "00000..01023"),
    ],
)
def test_pattern_without_a_match_is_an_error(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "00000.tar").touch()
    (tmp_path / "sub").mkdir()
    with pytest.raises(ShardError, match=message):
        expand_shards(pattern.replace("{here}", str(tmp_path)))


# Writing


def test_written_twice_is_equal_and_webdataset_reads_the_same(tmp_path: Path) -> None:
    samples = [
        *(sample(number) for number in range(5)),
        {"__key__": "ü" * 120, "jpg": b"x", "txt": "long key"},
    ]
    assert write_shard(tmp_path / "a.tar", iter(samples)) == 6
    write_shard(tmp_path / "b.tar", samples)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()

    theirs = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    expected = [(row["__key__"], {k: v for k, v in row.items() if not k.startswith("__")}) for row in theirs]
    assert read_all(tmp_path / "a.tar") == expected
    assert expected[3] == (
        "000000003",
        {"jpg": b"\3" * 111, "txt": "caption ü 3".encode(), "json": b'{"a": 2, "b": 1}'},
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"jpg": b"no key"},
        {"__key__": "a.b", "jpg": b""},
        {"__key__": "../a", "jpg": b""},
        {"__key__": "/a", "jpg": b""},
        {"__key__": "000000001", "jpg": b"repeated"},
        {"__key__": "x", "cls": 3},
    ],
)
def test_a_failed_write_leaves_the_old_shard(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [sample(9)])
    before = path.read_bytes()
    with pytest.raises(ShardError):
        write_shard(path, [sample(1), bad])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.tar"]


# Damage


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 20 * 512 + 700))
def test_a_cut_shard_keeps_exactly_its_whole_samples(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    write_shard(path, [sample(number) for number in range(1, 5)])
    whole, index = path.read_bytes(), index_shard(path)
    assert index.fault == ""
    ends = [max(sum(span) for span in index.members(position).values()) for position in range(4)]
    path.write_bytes(whole[:cut])
    damaged = index_shard(path)
    # Of the first sample nobody can say how many members it should have had.
    assert max(damaged.num_samples, 1) == max(sum(end <= cut for end in ends), 1)
    assert damaged.keys == index.keys[: damaged.num_samples]
    assert bool(damaged.fault) == (cut < ends[-1] // 512 * 512 + 1024)


def test_a_corrupt_header_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [sample(number) for number in range(1, 5)])
    data, index = bytearray(path.read_bytes()), index_shard(path)
    data[index.members(2)["jpg"].offset - 512 + 5] ^= 0xFF
    path.write_bytes(data)
    damaged = index_shard(path)
    assert damaged.keys == index.keys[:2]
    assert "corrupt header" in damaged.fault


@settings(deadline=None, max_examples=150)
@given(flips=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 255)), max_size=20))
def test_any_flipped_bytes_are_survived(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.tar"
    write_shard(path, [sample(number) for number in range(1, 5)])
    data = bytearray(path.read_bytes())
    for place, mask in flips:
        data[place] ^= mask
    path.write_bytes(data)
    read_all(path)


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    write_shard(tmp_path / "none.tar", [])
    (tmp_path / "zero.tar").touch()
    (tmp_path / "text.tar").write_text("not a tar" * 500)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.addfile(*_opened(regular("a.jpg", b"x")))
    for name, fault in {
        "none": "holds no sample",
        "zero": "empty file",
        "text": "plain tar",
        "packed": "plain",
    }.items():
        index = index_shard(tmp_path / f"{name}.tar")
        assert index.num_samples == 0
        assert fault in index.fault
    with pytest.raises(FileNotFoundError):
        index_shard(tmp_path / "absent.tar")


def _opened(member: tuple[tarfile.TarInfo, bytes]) -> tuple[tarfile.TarInfo, io.BytesIO]:
    return member[0], io.BytesIO(member[1])


# Hostile members


def test_links_and_unsafe_names_are_ignored(tmp_path: Path) -> None:
    link, hard, folder = tarfile.TarInfo("k1.jpg"), tarfile.TarInfo("k1.png"), tarfile.TarInfo("folder")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "k0.txt"
    folder.type = tarfile.DIRTYPE
    path = tmp_path / "hostile.tar"
    write_raw(
        path,
        [
            (folder, b""),
            regular("k0.JPG", b"fine"),
            regular("k0.txt", b"t"),
            regular("k0.txt", b"repeated"),
            (link, b""),
            (hard, b""),
            regular("k1.txt", b"its picture is a link"),
            regular("../escape.jpg", b"x"),
            regular("/abs.jpg", b"x"),
            regular("a/../../b.jpg", b"x"),
            regular("__meta__/m.json", b"x"),
            regular("README", b"x"),
            regular("sub/k2.seg.png", b"y"),
        ],
    )
    index = index_shard(path)
    assert read_all(path) == [
        ("k0", {"jpg": b"fine", "txt": b"t"}),
        ("k1", {"txt": b"its picture is a link"}),
        ("sub/k2", {"seg.png": b"y"}),
    ]
    assert index.fault.startswith("6 member(s) ignored")
    assert os.listdir(tmp_path) == ["hostile.tar"]


def test_a_huge_member_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.tar"
    info = tarfile.TarInfo("k.jpg")
    info.size = 1 << 40
    with open(path, "wb") as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(512 + info.size + 1024)  # a sparse file: it takes no room
    index = index_shard(path)
    assert (index.num_samples, index.fault) == (1, "")
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(ShardError, match="more than the"):
        read_member(descriptor, index.members(0)["jpg"])
    with pytest.raises(ShardError, match="cut after it was indexed"):
        read_member(descriptor, MemberSpan(512 + (1 << 40), 5000))
    os.close(descriptor)


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pax.tar"
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    with open(path, "wb") as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(2 << 40)
    assert "header of" in index_shard(path).fault


def test_nested_headers_do_not_overflow_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "nested.tar"
    header = tarfile.TarInfo("././@PaxHeader")
    header.type = tarfile.XHDTYPE
    path.write_bytes(header.tobuf() * 5000)
    assert index_shard(path).fault


def test_reading_shards_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, neuclip_scale.data.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert shards.MAX_MEMBER_BYTES == 64 << 20
