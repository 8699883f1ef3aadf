"""Captions with a word that names a class of ImageNet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from neuclip_scale.subset.errors import SubsetError
from neuclip_scale.subset.filters import PACKAGED_NAMES, TextFilter
from neuclip_scale.subset.wordnet import LONGEST_WORD, PARTS, WordNet, shortened

_SYNSET = re.compile(r"n(\d{8})")
_WORDS_REMEMBERED = 1 << 20


class EntityFinder:
    """Whether a caption has one of the words; what was asked before is remembered."""

    def __init__(self, each: TextFilter) -> None:
        """Read the filter's files; raises `SubsetError`."""
        self._is_entity = _by_wordnet(each) if each.wordnet else _by_name(each)
        self._known: dict[str, bool] = {}

    def __call__(self, texts: Sequence[str | None]) -> np.ndarray:
        """[n] bool; words are those that `str.split` finds, with the commas that stand at them."""
        return np.array([text is not None and any(map(self._ask, text.split())) for text in texts], dtype=bool)

    def _ask(self, word: str) -> bool:
        known = self._known.get(word)
        if known is None:
            if len(self._known) >= _WORDS_REMEMBERED:
                self._known.clear()
            known = self._known[word] = self._is_entity(word)
        return known


@lru_cache(maxsize=1)
def finder(each: TextFilter) -> EntityFinder:
    """The finder of a filter, made once a process."""
    return EntityFinder(each)


def files_of(each: TextFilter) -> list[Path]:
    """Every file that decides, for the digest; raises `SubsetError` where timm's lists are not there."""
    if each.wordnet:
        parts = [each.wordnet / name for part in PARTS for name in (f"index.{part}", f"{part}.exc")]
        return [*parts, each.synsets or _packaged("imagenet21k_goog_synsets.txt")]
    assert each.names is not None
    return [_names_file(each.names)]


def _by_wordnet(each: TextFilter) -> Callable[[str], bool]:
    assert each.wordnet is not None
    wordnet, path = WordNet(each.wordnet), files_of(each)[-1]
    offsets = set()
    for line in _read(path, "--synsets"):
        match = _SYNSET.fullmatch(line.split()[0])
        if match is None:
            raise SubsetError(f"--synsets {path}: {line[:40]!r} is no id of a synset. Give one a line, as n01440764.")
        offsets.add(int(match[1]))
    return lambda word: wordnet.first_sense(word) in offsets


def _by_name(each: TextFilter) -> Callable[[str], bool]:
    assert each.names is not None
    lines = _read(_names_file(each.names), "--names")
    if each.names == PACKAGED_NAMES:
        lines = [name for line in lines for name in line.partition("\t")[2].split(", ")]
    # Captions are compared word by word, so a name of two words can be in none.
    names = {line.lower() for line in lines if len(line.split()) == 1}
    if not names:
        raise SubsetError(f"--names {each.names}: has no name of one word. Give one a line, as `goldfish`.")

    def is_name(word: str) -> bool:
        word = word.lower()
        return len(word) <= LONGEST_WORD and (word in names or not names.isdisjoint(shortened([word], "noun")))

    return is_name


def _names_file(names: Path | str) -> Path:
    return _packaged("imagenet_synset_to_lemma.txt") if names == PACKAGED_NAMES else Path(names)


def _packaged(name: str) -> Path:
    """A list that timm carries; it is read without importing timm, which would load torch."""
    package = find_spec("timm")
    for place in (package.submodule_search_locations or ()) if package else ():
        path = Path(place) / "data" / "_info" / name
        if path.is_file():
            return path
    raise SubsetError(f"text_based: timm carries no {name}. pip install 'timm>=1.0.20', or give --synsets or --names.")


def _read(path: Path, option: str) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SubsetError(f"{option} {path}: cannot be read ({error}). Give a text, one a line.") from error
    return [line.strip() for line in lines if line.strip()]
