"""Filters on a row's own columns, against one plain function a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from subset_helpers import SCHEMA, Row, expected, is_basic, row_of, select, uids, write_pool, write_rows

from neuclip_scale.subset import (
    BasicFilter,
    CaptionFilter,
    ClipScoreFilter,
    Columns,
    EnglishFilter,
    SubsetError,
    UsageError,
)
from neuclip_scale.subset.conditions import passes_basic, passes_caption, passes_score
from neuclip_scale.subset.rows import Rows

CAPTIONS = st.one_of(
    st.none(),
    st.text(max_size=12),
    st.text(alphabet="ab \n\t\v\x00\x1c\x85\xa0\u2003\u3000é犬🐕", max_size=12),
    st.sampled_from(["two words", "three short words", "a  b", "", " ", "one\ntwo", "犬 が いる 公園"]),
)
SIDES = st.one_of(st.none(), st.integers(0, 700), st.sampled_from([0, 199, 200, 600, 601, 2**53 + 1]))
SCORES = st.one_of(st.none(), st.floats(), st.sampled_from([0.28, 0.3, 0.1 + 0.2]))


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    found = []
    for number in range(draw(st.integers(1, 30))):
        score = draw(SCORES)
        sides = {"original_width": draw(SIDES), "original_height": draw(SIDES)}
        found.append(row_of(number, text=draw(CAPTIONS), clip_b32_similarity_score=score, **sides))
    return found


def tokens(text: str) -> int:
    """As fasttext's readWord: blanks of ASCII end a word, and a line feed is a word itself."""
    count, is_inside = 0, False
    for letter in text:
        is_blank = letter in " \n\r\t\v\f\0"
        count += (letter == "\n") + (not is_blank and not is_inside)
        is_inside = not is_blank
    return count


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows(), st.integers(0, 4), st.integers(0, 9), st.sampled_from([0, 1, 200]), st.sampled_from([1.0, 1.5, 3.0]))
def test_cheap_filters_are_one_plain_function(
    found: list[Row], words: int, chars: int, side: int, aspect: float
) -> None:
    batch = pa.RecordBatch.from_pylist(found, schema=SCHEMA)
    given = Rows(batch, np.arange(len(found)))
    mask = passes_basic(given, BasicFilter(words, chars, side, aspect), Columns())
    assert mask.tolist() == [is_basic(row, words, chars, side, aspect) for row in found]

    mask = passes_caption(given, CaptionFilter(words, chars), Columns())
    texts = [row["text"] for row in found]
    assert mask.tolist() == [t is not None and tokens(t) >= words and len(t) >= chars for t in texts]

    mask = passes_score(given, ClipScoreFilter("b32", threshold=0.3), Columns(), None)
    scores = [row["clip_b32_similarity_score"] for row in found]
    assert mask.tolist() == [score is not None and score >= 0.3 for score in scores]


def test_no_filter_takes_all_and_several_are_joined_by_and(tmp_path: Path) -> None:
    found = [row_of(number, original_width=number) for number in range(100, 400)]
    pool = write_pool(tmp_path / "pool", [found])
    select(pool, tmp_path / "all.npy")
    assert uids(tmp_path / "all.npy") == expected(found, lambda row: True)
    made = select(pool, tmp_path / "some.npy", BasicFilter(), ClipScoreFilter("b32", threshold=0.35))
    assert uids(tmp_path / "some.npy") == expected(found, lambda row: is_basic(row) and row["original_width"] >= 350)
    # Numbers are asked before texts; each filter hears of those only that passed the one before it.
    assert [(each.name, each.asked, each.passed) for each in made.filters] == [
        ("clip_score_b32", 300, 50),
        ("basic", 50, 50),
    ]


def test_the_language_may_be_a_column(tmp_path: Path) -> None:
    languages = ["en", "EN", "de", None, "eng", ""]
    found = [row_of(number, lang=language) for number, language in enumerate(languages)]
    kind = pa.dictionary(pa.int8(), pa.string())
    pool = write_pool(tmp_path / "pool", [found], schema=SCHEMA.append(pa.field("lang", kind)))
    select(pool, tmp_path / "out.npy", EnglishFilter(column="lang"))
    assert uids(tmp_path / "out.npy") == expected(found[:2], lambda row: True)


def test_columns_have_names(tmp_path: Path) -> None:
    table = pa.table({"id": ["0" * 32, "1" * 32], "caption": ["a b c", "abcdef"], "w": [9, 9], "h": [9, 9.5]})
    pq.write_table(table, tmp_path / "mine.parquet")
    columns = Columns("id", "caption", "w", "h")
    select(tmp_path / "mine.parquet", tmp_path / "out.npy", BasicFilter(3, 3, 1, 2.0), columns=columns)
    assert uids(tmp_path / "out.npy") == ["0" * 32]
    with pytest.raises(SubsetError, match=r"has no column uid, but id, caption, w, h.*-column"):
        select(tmp_path / "mine.parquet", tmp_path / "out.npy")


def test_uids_are_numbers_and_each_is_written_once(tmp_path: Path) -> None:
    full, odd = "0123456789abcdef0123456789ABCDEF", "0000000123456789abcdef0123456789"
    texts = [full, full.lower(), odd, odd.lstrip("0"), "no-hex", None, ""]
    pool = write_pool(tmp_path / "pool", [[row_of(number, uid=uid) for number, uid in enumerate(texts)]])
    made = select(pool, tmp_path / "out.npy")
    found = uids(tmp_path / "out.npy")
    assert len(found) == made.num_uids == 3
    assert {full.lower(), odd.rjust(32, "0")} < set(found)
    assert made.num_repeated == 2
    # Rows without a uid cannot be selected: counted, listed, and no success.
    assert (made.num_unusable, made.status) == (2, 1)
    assert [row["row"] for row in made.unusable] == [5, 6]


def test_captions_that_are_no_utf8_are_judged_by_what_can_be_read(tmp_path: Path) -> None:
    texts = pa.array([b"three good words", b"\xff\xfe\xfd", b"a \xc3( b caption"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    table = pa.table({"uid": ["1" * 32, "2" * 32, "3" * 32], "text": strings})
    pq.write_table(table, tmp_path / "odd.parquet")
    select(tmp_path / "odd.parquet", tmp_path / "out.npy", CaptionFilter(3, 1))
    assert uids(tmp_path / "out.npy") == ["1" * 32, "3" * 32]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (BasicFilter(min_words=-1), "--min-words -1: give 0 or more"),
        (BasicFilter(max_aspect=0.5), "--max-aspect 0.5: give 1 or more"),
        (ClipScoreFilter("l14"), "give either --fraction or --threshold"),
        (ClipScoreFilter("l14", 0.3, 0.3), "give either --fraction or --threshold"),
        (ClipScoreFilter("l14", fraction=0.0), "--fraction 0.0: give a share"),
        (ClipScoreFilter("l14", fraction=float("nan")), "--fraction nan: give a share"),
        (ClipScoreFilter("l14", threshold=float("inf")), "--threshold inf: give a number"),
        (EnglishFilter(Path("/none/lid.bin")), "/none/lid.bin: there is no such file"),
    ],
)
def test_limits_that_make_no_sense_are_told(tmp_path: Path, made: BasicFilter, message: str) -> None:
    write_rows(tmp_path / "pool" / "0.parquet", [row_of(0)])
    with pytest.raises(UsageError, match=message):
        select(tmp_path / "pool", tmp_path / "out.npy", made)
