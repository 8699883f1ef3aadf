"""Lists joined bucket by bucket, against numpy.unique and numpy.save."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.subset import merging
from neuclip_scale.subset.merging import digest_of, merge, rows_of_buckets, sorted_rows

HALVES = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1]))
LISTS = st.lists(st.lists(st.tuples(HALVES, HALVES), max_size=40), max_size=5)


@settings(max_examples=80, deadline=None)
@given(LISTS, st.integers(1, 30))
def test_joined_lists_are_one_sorted_list(lists: list[list[tuple[int, int]]], rows_of_a_bucket: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, parts = Path(name), []
        for number, pairs in enumerate(lists):
            parts.append(folder / f"{number}.uids")
            rows = sorted_rows([np.array(pairs, dtype=np.uint64).reshape(-1, 2)])
            assert [tuple(row) for row in rows.tolist()] == sorted(pairs)
            parts[-1].write_bytes(rows.tobytes())
        merged = merge(parts, folder / "all.npy", rows_of_a_bucket)
        written = (folder / "all.npy").read_bytes()
        flat = [pair for pairs in lists for pair in pairs]
        wanted = np.array(sorted(set(flat)), dtype="u8,u8")
        buffer = io.BytesIO()
        np.save(buffer, wanted)
        assert written == buffer.getvalue()
        assert merged.num_uids == len(set(flat))
        assert merged.num_repeated == len(flat) - len(set(flat))
        assert digest_of(folder / "all.npy") == merged.digest

        (folder / "cut.npy").write_bytes(written[:-1])
        assert digest_of(folder / "cut.npy") is None or not flat
    assert digest_of(Path("/nothing.npy")) is None


def test_billions_of_rows_are_few_buckets() -> None:
    assert rows_of_buckets(0) == rows_of_buckets(1000) == 1 << 20
    num_rows = 12_800_000_000
    assert -(-num_rows // rows_of_buckets(num_rows)) <= 512
    assert 70 * rows_of_buckets(num_rows) < 2e9, "bytes that joining a bucket takes"


def test_each_list_is_opened_once_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_LEAST_ROWS_OF_A_BUCKET", 16)
    monkeypatch.setattr(merging, "_MOST_BUCKETS", 4)
    opened = []
    read = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda path, **options: opened.append(path) or read(path, **options))
    parts = [tmp_path / f"{number}.uids" for number in range(3)]
    generator = np.random.default_rng(0)
    for part in parts:
        part.write_bytes(sorted_rows([generator.integers(0, 2**64, (500, 2), dtype=np.uint64)]).tobytes())
    assert merge(parts, tmp_path / "all.npy").num_uids == 1500
    assert 3 <= max(opened.count(part) for part in parts) <= 5
