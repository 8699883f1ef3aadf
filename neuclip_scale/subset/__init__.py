"""From a pool's metadata to the uids of a subset, by DataComp's filters and combinations of them.

`pool` finds the parquets, `cuts` the score of a top fraction, `judging` asks rows filter by filter (`conditions`,
`language`, `entities`, `embeddings` with `clusters`), `merging` joins what passed. torch only for clusters.
"""

from neuclip_scale.subset.errors import SubsetError, UsageError
from neuclip_scale.subset.filters import (
    BasicFilter,
    CaptionFilter,
    ClipScoreFilter,
    EnglishFilter,
    ImageFilter,
    TextFilter,
)
from neuclip_scale.subset.outcome import FilterOutcome, Subset, Unreadable
from neuclip_scale.subset.request import Columns, SubsetRequest
from neuclip_scale.subset.selecting import select_subset

__all__ = [
    "BasicFilter",
    "CaptionFilter",
    "ClipScoreFilter",
    "Columns",
    "EnglishFilter",
    "FilterOutcome",
    "ImageFilter",
    "Subset",
    "SubsetError",
    "SubsetRequest",
    "TextFilter",
    "Unreadable",
    "UsageError",
    "select_subset",
]
