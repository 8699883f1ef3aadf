"""What is found in plain tars at once, without `tarfile`, against `tarfile` and one by one."""

from __future__ import annotations

import io
import re
import tarfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.data.shards.index import _index_by_tarfile, index_plain_shard
from neuclip_scale.data.shards.names import split_name, split_names
from neuclip_scale.data.shards.plain import _are_one_mtime, _tells_times_only, plain_files


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Tars of all kinds: ustar, GNU and pax, short and long names, odd types, owners and times; some damaged."""
    stream = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    plain = st.from_regex(r"[a-c]{1,2}\.(jpg|JSON|txt)", fullmatch=True)
    odd = st.sampled_from(
        ["", "a", "x/", "x/a.jpg", "./a.txt", "/a.jpg", "../a.jpg", "__m__.x", "_a.jpg", "é.jpg", ".a"]
    )
    long = st.sampled_from(["k" * 99 + ".j", "k" * 96 + ".jpg", "d" * 60 + "/" + "k" * 60 + ".jpg"])
    kinds = st.sampled_from(
        [tarfile.REGTYPE] * 12 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CONTTYPE]
    )
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for _ in range(draw(st.integers(0, 6))):
            info = tarfile.TarInfo(draw(st.one_of(plain, plain, plain, odd, long)))
            info.type, info.size = draw(kinds), draw(st.sampled_from([0, 1, 511, 512, 513, 3000, 9000]))
            info.mtime = draw(st.sampled_from([0, 1_700_000_000, 1.5, 1_700_000_000.25, -3]))
            info.uid, info.uname = draw(st.sampled_from([0, 1000, 1 << 30])), draw(st.sampled_from(["", "me", "ü"]))
            if form == tarfile.PAX_FORMAT:
                extra = st.sampled_from([{}, {}, {"atime": "1.5", "ctime": "2.5"}, {"comment": "c"}, {"path": "q.jpg"}])
                info.pax_headers = draw(extra)
            with suppress(ValueError):  # what ustar cannot hold
                archive.addfile(info, io.BytesIO(b"\1" * info.size) if info.isreg() else None)
    data = bytearray(stream.getvalue())
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=2)):
        data[place] = value
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@settings(deadline=None, max_examples=400)
@given(data=tars())
def test_fast_and_slow_road_agree(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    path.write_bytes(data)
    fast, slow = index_plain_shard(path), _index_by_tarfile(str(path))
    if fast is not None:
        for each in fields(fast):
            assert np.array_equal(getattr(fast, each.name), getattr(slow, each.name)), each.name


@pytest.mark.parametrize("mtime", [0, 1_700_000_000.25])
@pytest.mark.parametrize("count", [1, 5000])
def test_what_webdataset_and_img2dataset_write_takes_the_fast_road(tmp_path: Path, mtime: float, count: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:09d}.txt")
            info.size, info.mtime = number % 700, mtime
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    index = index_plain_shard(path)
    assert index is not None
    assert (index.num_samples, index.fault) == (count, "")


NAMES = st.one_of(
    st.from_regex(r"[a-c0-9_é]{0,9}\.[a-zA-Z.é]{0,17}", fullmatch=True),
    st.from_regex(r"[a-c0-9]{1,12}\.(jpg|JSON|seg\.png)", fullmatch=True),
    st.sampled_from(["", "a", "a/b.jpg", "__m__.x", "k" * 82 + ".jpg", "k" * 83 + ".jpg", "k" * 96 + ".jpg"]),
)


@given(st.one_of(st.lists(NAMES, min_size=1, max_size=4), st.lists(NAMES, min_size=1, max_size=1)))
def test_names_split_at_once_are_split_as_one_by_one(names: list[str]) -> None:
    rows = np.array([name.encode() for name in names], dtype="S100").view(np.uint8).reshape(-1, 100)
    split = split_names(rows)
    if split is None:
        usual = [name for name in names if re.fullmatch(r"[^._/][^./]{0,81}\.[^/é]{1,16}", name)]
        assert len(usual) < len(names)
    else:
        keys, extensions = ([raw.decode() for raw in part.tolist()] for part in split)
        assert list(zip(keys, extensions, strict=True)) == [split_name(name) for name in names]


@pytest.mark.parametrize(
    "name",
    ["", "a", "a.", ".a", "_a.jpg", "a/b.jpg", "a.b/c", "a.é", "a." + "x" * 17, "a.b." + "x" * 15, "k" * 83 + ".j"],
)
def test_an_unusual_name_is_not_split_at_once(name: str) -> None:
    for names in ([name], ["b.jpg", name], [name, "b.jpg"]):
        assert split_names(np.array([each.encode() for each in names], "S100").view(np.uint8).reshape(-1, 100)) is None


@pytest.mark.parametrize("name", ["x/", "x" * 99 + "/"])
def test_an_old_folder_is_left_to_tarfile(tmp_path: Path, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type = tarfile.AREGTYPE
    folder, picture = (each.tobuf(tarfile.USTAR_FORMAT) for each in (info, tarfile.TarInfo("a.jpg")))
    assert folder.startswith(name.encode())
    for number, (headers, is_plain) in enumerate([(picture, True), (folder + picture, False)]):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(headers + bytes(1024))
        assert (index_plain_shard(path) is not None) == is_plain


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, 1400, 1535, 1536, 1600, 2048])
def test_a_shard_that_is_cut_while_it_is_read(tmp_path: Path, kept: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.mtime = 1.5
    path = tmp_path / "a.tar"
    path.write_bytes((info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))[:kept])
    with open(path, "rb", buffering=0) as file:
        assert (plain_files(file.fileno(), 2560) is None) == (kept < 2048)


RECORDS = st.builds(
    lambda length, name, value, end, rest: f"{length} {name}={value}".encode() + end + rest,
    st.integers(0, 120),
    st.sampled_from(["mtime", "atime", "path", "mtimes"]),
    st.from_regex(r"[0-9.]{0,12}|-1\.5|1e5|[0-9.]{80,95}", fullmatch=True),
    st.sampled_from([b"\n", b"", b"\n\n", b"\0\n"]),
    st.sampled_from([b"", b"", b"", b"20 ctime=1234567890\n", b"\0x", bytes(200) + b"x"]),
)
MTIMES = st.builds(
    lambda value, end: f"{len(value) + 9 + len(end)} mtime={value}{end}".encode(),
    st.from_regex(r"|[0-9]{0,10}\.[0-9]{0,9}", fullmatch=True),
    st.sampled_from(["\n", "\n", "\n", "", "0"]),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.one_of(RECORDS, MTIMES), st.sampled_from([0, 0, 0, 1, -1])), min_size=1, max_size=5))
def test_times_seen_at_once_are_times(records: list[tuple[bytes, int]]) -> None:
    contents = np.frombuffer(b"".join(record.ljust(512, b"\0") for record, _ in records), np.uint8).reshape(-1, 512)
    sizes = np.array([max(len(record.rstrip(b"\0")) + more, 0) for record, more in records])
    for content, size, seen in zip(contents, sizes.tolist(), _are_one_mtime(contents, sizes), strict=True):
        slowly = _tells_times_only(content.tobytes(), size)
        assert slowly or not seen
        if re.fullmatch(rb"[0-9]{2} mtime=[0-9.]+\n", content.tobytes().rstrip(b"\0")):
            assert seen == slowly
