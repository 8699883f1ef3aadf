"""Samples renamed in place against the same samples taken apart and put together again."""

from __future__ import annotations

import io
import tarfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.reshard.buffers import Buffer
from neuclip_scale.reshard.patching import Patched, patch
from neuclip_scale.reshard.tar_header import BLOCK, PADDING, member_header, members_of

Members = list[tuple[str, bytes]]
SAMPLES = st.lists(
    st.dictionaries(st.sampled_from(["jpg", "txt", "json", "seg.PNG"]), st.binary(max_size=1300), min_size=1),
    min_size=1,
    max_size=6,
)


def extent(key: str, members: Members, form: int = tarfile.GNU_FORMAT, **fields: object) -> bytes:
    """A sample as `tarfile` writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for extension, data in members:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mtime, info.mode, info.uname = len(data), 1_700_000_000, 0o600, "somebody"
            for name, value in fields.items():
                setattr(info, name, value)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset
    return stream.getvalue()[:end]


def patched(part: bytes, keys: list[str]) -> Patched | None:
    """`part`, one sample, patched; checks that what cannot be patched stays as it was."""
    content = np.frombuffer(bytearray(part), dtype=np.uint8)
    found = patch(content, [len(part)], keys, Buffer())
    assert found is not None or content.tobytes() == part
    return found


@settings(deadline=None)
@given(SAMPLES, st.lists(st.sampled_from([1_700_000_000, 1.5, 1_700_000_000.25]), min_size=6, max_size=6))
def test_it_makes_the_bytes_of_the_slow_road(samples: list[dict[str, bytes]], times: list[float]) -> None:
    extents = [
        extent(f"old{number}", list(members.items()), tarfile.PAX_FORMAT, mtime=times[number])
        for number, members in enumerate(samples)
    ]
    keys = [f"{number:012d}" for number in range(len(samples))]
    content = np.frombuffer(bytearray(b"".join(extents)), dtype=np.uint8)
    found = patch(content, [len(part) for part in extents], keys, Buffer())
    pieces, crcs = [], []
    for key, part in zip(keys, extents, strict=True):
        piece, row = b"", []
        for extension, (start, size) in members_of(part).items():
            data = part[start : start + size]
            piece += member_header(f"{key}.{extension}", size) + data + PADDING[size % BLOCK]
            row.append(zlib.crc32(data))
        pieces.append(piece)
        crcs.append(row)
    assert found is not None
    assert (found.lengths, found.crcs) == ([len(piece) for piece in pieces], crcs)
    assert found.content.tobytes() == b"".join(pieces)
    with tarfile.open(fileobj=io.BytesIO(found.content.tobytes() + bytes(1024))) as archive:  # another reader
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
        extent("a", GOOD, tarfile.PAX_FORMAT, mtime=1.5)[: -2 * BLOCK],
        extent("a", GOOD, tarfile.PAX_FORMAT, mtime=1.5)[: 2 * BLOCK] * 2 + extent("a", GOOD),
        extent("a", [("jpg", extent("b", GOOD))]),
        extent("a", [("x" * 17, b"long extension")]),
        extent("a", GOOD, type=tarfile.SYMTYPE, size=0, linkname="b"),
        extent("a", GOOD, type=tarfile.DIRTYPE, size=0),
        extent("k" * 101, GOOD),
        extent("a", GOOD, mtime=8**12),  # base-256
    ],
    ids=[
        "repeated",
        "unsafe",
        "metadata",
        "cut off",
        "pax at the end",
        "pax after pax",
        "tar in tar",
        "long extension",
        "link",
        "folder",
        "long name",
        "odd number",
    ],
)
def test_what_is_not_plain_is_left_as_it_was(part: bytes) -> None:
    assert patched(part, ["key"]) is None


@pytest.mark.parametrize("at", [0, 99, 124, 130, 148, 156, 257, 345, 500])
def test_a_changed_byte_of_a_header_is_seen(at: int) -> None:
    part = bytearray(extent("a", GOOD))
    part[at] ^= 0x11
    assert patched(part, ["key"]) is None


def test_samples_must_begin_where_they_should() -> None:
    part = extent("a", GOOD) * 2
    content = np.frombuffer(bytearray(part), dtype=np.uint8)
    half = len(part) // 2
    assert patch(content, [half - BLOCK, half + BLOCK], ["k1", "k2"], Buffer()) is None
    assert content.tobytes() == part
    assert patch(content, [half, half], ["k1", "k2"], Buffer()) is not None


def test_a_name_that_does_not_fit_is_left_to_the_slow_road() -> None:
    part = extent("a", GOOD)
    assert patched(part, ["k" * 97]) is None
    assert patched(part, ["k" * 96]) is not None
