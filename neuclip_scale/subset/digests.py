"""What decides a selection, as one number: settings, and the contents of every file they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuclip_scale.subset.entities import files_of
from neuclip_scale.subset.filters import EnglishFilter, Filter, ImageFilter, TextFilter
from neuclip_scale.subset.pool import MetadataFile
from neuclip_scale.subset.request import Columns

_FORMAT = 1
"""Rises when equal settings come to select other rows."""


def settings_of(each: Filter) -> dict[str, Any]:
    """A filter's settings for a report, files by their paths."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(each).items()}


def filters_digest(filters: Sequence[Filter], model: Path | None) -> str:
    """Equal for filters that keep the same rows of any pool, wherever their files lie; in any order."""
    return digest_of_values([_FORMAT, sorted(json.dumps(_deciding(each, model), sort_keys=True) for each in filters)])


def selection_digest(filters: str, columns: Columns, files: Iterable[MetadataFile]) -> str:
    """Of the filters on one pool: changes when a file of it does."""
    return digest_of_values([filters, asdict(columns), [file.fingerprint for file in files]])


def _deciding(each: Filter, model: Path | None) -> dict[str, Any]:
    settings = settings_of(each)
    files: list[Path] = []
    match each:
        case EnglishFilter(column=""):
            assert model is not None, "the request found it"
            files = [model]
            del settings["model"]
        case TextFilter():
            files = files_of(each)
            settings = {"by": "wordnet" if each.wordnet else "names"}
        case ImageFilter():
            files = [path for path in (each.centroids, each.target_embeddings, each.clusters) if path]
            by = "clusters" if each.clusters else "target_embeddings"
            settings = {"by": by, "embedding": each.embedding}
    return {"name": each.name, **settings, "files": [_contents(path) for path in files]}


def _contents(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of_values(value: Any) -> str:
    """16 hexadecimal digits of what JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
