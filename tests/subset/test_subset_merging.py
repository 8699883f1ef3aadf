"""Lists joined bucket by bucket, against numpy.unique and numpy.save."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.subset.merging import digest_of, merge, sorted_rows

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
