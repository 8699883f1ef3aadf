"""The filters that need nothing but a row's own columns."""

from __future__ import annotations

import re

import numpy as np

from neuclip_scale.queries.uids import normal_uid
from neuclip_scale.subset.cuts import LARGEST, Cut
from neuclip_scale.subset.filters import BasicFilter, CaptionFilter, ClipScoreFilter, EnglishFilter
from neuclip_scale.subset.request import Columns
from neuclip_scale.subset.rows import Rows

_TOKEN = re.compile(r"\n|[^ \n\r\t\v\f\0]+")


def passes_basic(rows: Rows, each: BasicFilter, columns: Columns) -> np.ndarray:
    """[n] bool. A row without a caption or a size passes no limit on it."""
    width, height = rows.numbers(columns.width_column), rows.numbers(columns.height_column)
    smaller, larger = np.minimum(width, height), np.maximum(width, height)
    with np.errstate(divide="ignore", invalid="ignore"):
        mask = (smaller >= each.min_side) & (larger / smaller <= each.max_aspect)
    texts = rows.where(mask).texts(columns.text_column)
    mask[mask] = [
        text is not None and len(text) >= each.min_chars and len(text.split()) >= each.min_words for text in texts
    ]
    return mask


def passes_caption(rows: Rows, each: CaptionFilter, columns: Columns) -> np.ndarray:
    """[n] bool."""
    return np.array(
        [
            text is not None and len(text) >= each.min_chars and len(_TOKEN.findall(text)) >= each.min_tokens
            for text in rows.texts(columns.text_column)
        ],
        dtype=bool,
    )


def passes_score(rows: Rows, each: ClipScoreFilter, columns: Columns, cut: Cut | None) -> np.ndarray:
    """[n] bool: by the threshold, or by the cut that stands for a fraction. NaN and null never pass."""
    score = rows.numbers(columns.score(each.arch))
    if cut is None:
        return np.asarray(score >= each.threshold)
    score = np.clip(score, -LARGEST, LARGEST)
    if cut.last_uid is None:
        return np.asarray(score >= cut.threshold)
    mask = score > cut.threshold
    tied = np.flatnonzero(score == cut.threshold)
    if len(tied):
        uids = rows.where(score == cut.threshold).texts(columns.uid_column)
        mask[tied] = [uid is not None and normal_uid(uid) <= cut.last_uid for uid in uids]
    return np.asarray(mask)


def passes_language_column(rows: Rows, each: EnglishFilter) -> np.ndarray:
    """[n] bool: the column names the language, in any case."""
    wanted = each.language.lower()
    return np.array([text is not None and text.lower() == wanted for text in rows.texts(each.column)], dtype=bool)
