"""Uids, requests and the plan, held to dicts and sorted lists."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.json_uid import json_uid, plain_uids
from neuclip_scale.reshard.matching import Rows
from neuclip_scale.reshard.plan import Cut, make_plan
from neuclip_scale.reshard.request import load_request
from neuclip_scale.reshard.tar_header import member_header, members_of
from neuclip_scale.reshard.uids import Uids, parse_uids, uid_text

ORDER_OF_SEED_0 = [1, 6, 4, 0, 5, 7, 3, 2]
numbers = st.one_of(st.integers(0, 5), st.integers(0, 3).map(lambda n: n << 64 | 1), st.integers(0, (1 << 128) - 1))


@settings(deadline=None)
@given(asked=st.lists(numbers, min_size=1), pool=st.lists(numbers))
def test_requests_find_what_a_dict_finds(
    tmp_path_factory: pytest.TempPathFactory, asked: list[int], pool: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "s.npy"
    np.save(path, np.array([divmod(number, 1 << 64) for number in asked], dtype="u8,u8"))
    request = load_request(path)
    unique = sorted(set(asked))
    assert [h << 64 | low for h, low in zip(request.uids.high.tolist(), request.uids.low.tolist())] == unique
    assert request.num_requested == len(asked)
    counts = Counter(asked)
    assert request.counts is None or request.counts.tolist() == [counts[number] for number in unique]
    wanted = Uids(
        *(np.array([f(n) for n in pool], dtype=np.uint64) for f in (lambda n: n >> 64, lambda n: n & (1 << 64) - 1))
    )
    places = {number: row for row, number in enumerate(unique)}
    assert request.find(wanted).tolist() == [places.get(number, -1) for number in pool]


@given(texts=st.lists(st.one_of(st.from_regex(r"[0-9a-fA-F]{24,33}", fullmatch=True), st.text(max_size=4))))
def test_uids_of_texts(texts: list[str]) -> None:
    uids, others = parse_uids(texts)
    for row, text in enumerate(texts):
        is_uid = 25 <= len(text) <= 32 and text.isascii() and text.isalnum()
        assert (row in others) != is_uid
        if is_uid:
            assert uid_text(int(uids.high[row]), int(uids.low[row])) == text.lower().rjust(32, "0")


def test_broken_requests(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros(3))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\1")
    np.save(tmp_path / "huge.npy", np.zeros(2, dtype="u8,u8"))
    content = (tmp_path / "huge.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(content.replace(b"(2,), }" + b" " * 12, b"(2000000000000,), }", 1))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 100)
    (tmp_path / "x.parquet").write_bytes(b"PAR1xxxx")
    for name, message in {
        "floats.npy": "u8,u8",
        "cut.npy": "numpy.save",
        "huge.npy": "ends after 2 of 2000000000000 uids",
        "empty.txt": "holds no uid",
        "binary": "neither",
        "x.parquet": "not a readable parquet",
        "absent": "No such file",
    }.items():
        with pytest.raises(ReshardError, match=message):
            load_request(tmp_path / name)


def test_a_mark_of_byte_order_is_no_part_of_the_first_uid(tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_text(f"{'0' * 31}1\r\n{'0' * 31}2\r\n", "utf-8-sig", newline="")
    request = load_request(tmp_path / "windows.txt")
    assert (request.uids.low.tolist(), request.texts) == ([1, 2], {})


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.text(max_size=5), st.just('x", "uid": "' + "a" * 32), st.just("f" * 32)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["uid", 'a"uid', "b"]), inner)
    ),
)


@settings(max_examples=400)
@given(
    value=st.dictionaries(st.sampled_from(["uid", 'a"uid', "b", "\\uid"]), json_values),
    indent=st.sampled_from([None, 1]),
)
def test_uid_of_a_json(value: dict, indent: int | None) -> None:
    raw = json.dumps(value, indent=indent).encode()
    expected = value.get("uid")
    assert json_uid(raw) == (None if expected is None else str(expected))


NOT_SEEN = st.sampled_from([b"", b"{", b"}", b'"uid"', b'{"uid": "' + b"f" * 32, b'": "' + b"a" * 32 + b'"}', b"[]"])
USUAL = st.fixed_dictionaries(
    {"uid": st.from_regex(r"[0-9a-fA-F]{32}", fullmatch=True), "caption": st.text(max_size=9)},
    optional={"face_bboxes": st.just([[0.1, 0.2]]), "exif": st.just(json.dumps({"a": "[1, 2]", "b": "{}"}))},
)


@settings(max_examples=300)
@given(st.lists(st.one_of(NOT_SEEN, USUAL, st.dictionaries(st.sampled_from(["uid", "b", "\\uid"]), json_values))))
def test_uids_seen_at_once_are_those_of_the_parser(values: list[bytes | dict]) -> None:
    raws = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    for value, raw, seen in zip(values, raws, plain_uids(raws), strict=True):
        if isinstance(value, bytes):
            assert seen is None
        else:
            assert seen is None or seen == str(json_uid(raw)).lower()
            if "caption" in value and "{" not in value["caption"]:
                assert seen == value["uid"].lower()


HEX = "0123456789abcdefABCDEF0123456789"


@pytest.mark.parametrize(
    ("raw", "uid"),
    [
        (f'{{"a": {{"uid": "{HEX}"}}}}', None),
        (f'{{"a":\n{{"uid": "{HEX}"}}}}', None),
        (f'{{"a": [0,{{"uid": "{HEX}"}}]}}', None),
        (f'{{"uid": "{HEX}", "uid": 5}}', "5"),
        (f'{{"uid": "{HEX}", "uid": "{HEX[::-1]}"}}', HEX[::-1]),
        (f'{{"a\\"uid": "{HEX}"}}', None),
        (f' {{"uid": "{HEX}"}}', HEX),
        (f'{{"uid": "{HEX}"}} ', HEX),
    ],
)
def test_a_uid_that_is_not_certain_is_left_to_the_parser(raw: str, uid: str | None) -> None:
    assert json_uid(raw.encode()) == uid
    sure = f'{{"key": "a", "uid" : "{HEX}", "boxes": [[1, 2]]}}'.encode()
    assert plain_uids([sure, raw.encode(), sure]) == [HEX.lower(), None, HEX.lower()]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"a": ' + b"[" * 100_000, b"\xff"])
def test_what_is_no_object(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        json_uid(raw)


@given(
    written=st.lists(st.integers(1, 50), max_size=40),
    samples=st.integers(1, 12),
    num_bytes=st.integers(512, 60_000),
    seed=st.one_of(st.none(), st.integers(0, 1 << 70)),
)
def test_plans(written: list[int], samples: int, num_bytes: int, seed: int | None) -> None:
    rows = Rows(*(np.array(part, dtype=np.uint32) for part in (range(len(written)), written, written, written)))
    for cut in (Cut(samples=samples), Cut(num_bytes=num_bytes)):
        plan = make_plan(rows, cut, seed)
        order = plan.rows.shard.tolist()
        assert sorted(order) == list(range(len(written)))
        assert plan.rows.written.tolist() == [written[row] for row in order]
        assert seed is not None or order == sorted(order)
        counts = np.diff(plan.starts)
        assert (counts > 0).all()
        assert int(counts.sum()) == len(written)
        if cut.samples:
            assert len(counts) == -(-len(written) // samples)
            assert not len(counts) or counts.max() - counts.min() <= 1
        for number in range(plan.num_outputs):
            size = (int(plan.output(number).written.sum()) + 2) * 512
            assert not cut.num_bytes or size <= num_bytes or counts[number] == 1


def test_the_shuffle_is_the_same_for_ever() -> None:
    rows = Rows(*(np.arange(8, dtype=np.uint32) for _ in range(4)))
    assert make_plan(rows, Cut(samples=8), 0).rows.shard.tolist() == ORDER_OF_SEED_0
    assert make_plan(rows, Cut(samples=8), 1).rows.shard.tolist() != ORDER_OF_SEED_0


@given(name=st.from_regex(r"[a-zü0-9]{1,20}\.[a-z]{1,4}", fullmatch=True), size=st.integers(0, (8 << 30) - 1))
def test_headers_are_what_tarfile_reads(name: str, size: int) -> None:
    info = tarfile.TarInfo.frombuf(member_header(name, size), "utf-8", "surrogateescape")
    assert (info.name, info.size, info.type, info.mode, info.mtime) == (name, size, tarfile.REGTYPE, 0o644, 0)


def test_damaged_extents_are_seen() -> None:
    extent = bytearray(member_header("a.jpg", 600) + bytes(1024) + member_header("a.txt", 3) + b"abc".ljust(512, b"\0"))
    assert members_of(bytes(extent)) == {"jpg": (512, 600), "txt": (2048, 3)}
    for place in (0, 130, 150, 156, 300, 1536 + 2):
        damaged = bytearray(extent)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match=r"."):
            members_of(bytes(damaged))
    with pytest.raises(ValueError, match="cut off"):
        members_of(bytes(extent[:1000]))
