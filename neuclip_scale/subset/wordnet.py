"""WordNet 3.0 as its files tell it: the first sense of a word, found as nltk 3.8.1 finds it, which DataComp used.

Format of the files: wndb(5WN); rules for inflected words: morphy(7WN).
"""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.subset.errors import SubsetError

PARTS = ("noun", "verb", "adj", "adv")
"""In the order in which a word's senses are looked for."""
_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}
LONGEST_WORD = 100
"""Of letters; the longest entry has 71."""


class WordNet:
    """Entries and exceptions of all four parts of speech, some 60 MB."""

    def __init__(self, folder: Path) -> None:
        """Read index.* and *.exc of `folder`; raises `SubsetError` when they are not what wndb(5WN) describes."""
        self._senses: dict[str, dict[str, int]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        for part in PARTS:
            self._senses[part] = dict(_entry(line, path) for path, line in _lines(folder / f"index.{part}"))
            words = (line.split() for _, line in _lines(folder / f"{part}.exc"))
            self._exceptions[part] = {form: bases for form, *bases in words}

    def first_sense(self, word: str) -> int | None:
        """The offset of the word's most frequent sense, as a noun if it has one; None for no word of WordNet.

        Offsets of different parts of speech may be equal, as they are in nltk's `synsets(word)[0].offset()`.
        """
        word = word.lower()
        if len(word) > LONGEST_WORD:
            return None
        for part in PARTS:
            base = self._base(word, part)
            if base is not None:
                return self._senses[part][base]
        return None

    def _base(self, word: str, part: str) -> str | None:
        """The entry that `word` is a form of."""
        senses = self._senses[part]
        if word in senses:
            return word
        irregular = self._exceptions[part].get(word)
        if irregular is not None:
            return next((form for form in irregular if form in senses), None)
        forms = shortened([word], part)
        while forms:
            found = next((form for form in forms if form in senses), None)
            if found is not None:
                return found
            forms = shortened(forms, part)
        return None


def shortened(forms: list[str], part: str) -> list[str]:
    """The forms with each ending that fits taken off, each once."""
    return list(
        dict.fromkeys(form[: -len(old)] + new for form in forms for old, new in _ENDINGS[part] if form.endswith(old))
    )


def _lines(path: Path) -> list[tuple[Path, str]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SubsetError(f"--wordnet: {path} cannot be read ({error}). Give the folder of WordNet 3.0.") from error
    # The licence stands above the entries, each of its lines after two spaces.
    return [(path, line) for line in text.splitlines() if line.strip() and not line.startswith("  ")]


def _entry(line: str, path: Path) -> tuple[str, int]:
    """Word and offset of its first sense: `lemma pos num_senses num_pointers [pointer...] n n offset...`."""
    fields = line.split()
    try:
        return fields[0], int(fields[6 + int(fields[3])])
    except (ValueError, IndexError) as error:
        raise SubsetError(f"--wordnet: {path}: {line[:60]!r} is no entry of an index. Fetch it again.") from error
