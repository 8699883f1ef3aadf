"""Samples renamed in place against the same samples taken apart and put together again."""

from __future__ import annotations

import io
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.reshard.patching import WrittenMember, patch
from neuclip_scale.reshard.tar_header import BLOCK, PADDING, member_header, members_of

Members = list[tuple[str, bytes]]
SAMPLES = st.lists(
    st.dictionaries(st.sampled_from(["jpg", "txt", "json", "seg.PNG"]), st.binary(max_size=1300), min_size=1),
    min_size=1,
    max_size=6,
)


def extent(key: str, members: Members, **fields: object) -> bytearray:
    """A sample as `tarfile` writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for extension, data in members:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mtime, info.mode, info.uname = len(data), 1_700_000_000, 0o600, "somebody"
            for name, value in fields.items():
                setattr(info, name, value)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset
    return bytearray(stream.getvalue()[:end])


@settings(deadline=None)
@given(SAMPLES)
def test_it_makes_the_bytes_of_the_slow_road(samples: list[dict[str, bytes]]) -> None:
    extents = [extent(f"old{number}", list(members.items())) for number, members in enumerate(samples)]
    keys = [f"{number:012d}" for number in range(len(samples))]
    content = bytearray(b"".join(extents))
    found = patch(content, [len(part) for part in extents], keys)
    expected, members = b"", []
    for key, part in zip(keys, extents, strict=True):
        row = []
        for extension, (start, size) in members_of(bytes(part)).items():
            header, data = member_header(f"{key}.{extension}", size), bytes(part[start : start + size])
            expected += header + data + PADDING[size % BLOCK]
            row.append(WrittenMember(extension, size, zlib.crc32(data)))
        members.append(row)
    assert found == members
    assert content == expected
    with tarfile.open(fileobj=io.BytesIO(bytes(content) + bytes(1024))) as archive:  # another reader
        names = [f"{key}.{name.lower()}" for key, sample in zip(keys, samples, strict=True) for name in sample]
        assert archive.getnames() == names


GOOD = [("jpg", b"picture" * 90), ("txt", b"words")]


@pytest.mark.parametrize(
    "part",
    [
        extent("a", [*GOOD, ("jpg", b"again")]),
        extent("../a", GOOD),
        extent("__a__/b", GOOD),
        extent("a", GOOD)[:-BLOCK],
        extent("a", GOOD, type=tarfile.SYMTYPE, size=0, linkname="b"),
        extent("a", GOOD, type=tarfile.DIRTYPE, size=0),
        extent("k" * 101, GOOD),
        extent("a", GOOD, mtime=8**12),  # base-256
    ],
    ids=["repeated", "unsafe", "metadata", "cut off", "link", "folder", "long name", "odd number"],
)
def test_what_is_not_plain_is_left_as_it_was(part: bytearray) -> None:
    before = bytes(part)
    assert patch(part, [len(part)], ["key"]) is None
    assert part == before


@pytest.mark.parametrize("at", [0, 99, 124, 130, 148, 156, 257, 345, 500])
def test_a_changed_byte_of_a_header_is_seen(at: int) -> None:
    part = extent("a", GOOD)
    part[at] ^= 0x11
    before = bytes(part)
    assert patch(part, [len(part)], ["key"]) is None
    assert part == before


def test_a_name_that_does_not_fit_is_left_to_the_slow_road() -> None:
    part = extent("a", GOOD)
    assert patch(part, [len(part)], ["k" * 97]) is None
    assert patch(part, [len(part)], ["k" * 96]) is not None
