"""Which caption a pair is given: one source, or one of several drawn anew each time the sample is read."""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from neuclip_scale.config import DataConfig

_DRAW = 4  # first word of the seed; data.streams and data.stream_dataset use others


class NoCaption(ValueError):  # noqa: N818 - it is no fault of the program
    """No source of a sample gives a caption; the message is the reason, in one line."""


class Source(NamedTuple):
    """A tar member that is the caption, or a field of one that is JSON."""

    member: str
    field: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """`txt` or `json:caption`; extensions are lower case, as in the index of a shard."""
        member, _, field = text.partition(":")
        return cls(member.lower(), field)

    def __str__(self) -> str:
        return f"{self.member}:{self.field}" if self.field else self.member


class Members:
    """The texts of one sample, each read once and parsed once at most."""

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        """`read` gives the bytes of a member by its extension, None where there is none."""
        self._read = read
        self._documents: dict[str, Any] = {}

    def text(self, member: str) -> bytes | None:
        """The bytes of a member; None where there is none."""
        return self._read(member)

    def document(self, member: str) -> Any:
        """What a JSON member says; None where there is none. Raises `NoCaption` for what is no JSON."""
        if member not in self._documents:
            self._documents[member] = self._parse(member)
        document = self._documents[member]
        if isinstance(document, NoCaption):
            raise document
        return document

    def _parse(self, member: str) -> Any:
        data = self._read(member)
        try:
            return None if data is None else json.loads(data)
        except (ValueError, RecursionError):
            return NoCaption(f"{member} is not JSON")


@dataclass(frozen=True)
class Captions:
    """Sources and the probabilities with which they are drawn."""

    sources: tuple[Source, ...]
    probabilities: tuple[float, ...]

    @classmethod
    def of(cls, section: DataConfig) -> Captions:
        """Those that a recipe asks for; equal probabilities where it gives no weights."""
        sources = tuple(map(Source.parse, section.captions or (section.caption_key,)))
        weights = section.caption_weights or (1.0,) * len(sources)
        return cls(sources, tuple(weight / sum(weights) for weight in weights))

    def choose(self, members: Members, seed: Sequence[int]) -> str:
        """A caption fixed by `seed`: of the drawn source, or of the next that has one; of a list, any of its entries.

        Raises `NoCaption` if no source has one.
        """
        reasons, generator, drawn = [], _Lazily(seed), 0
        if len(self.sources) > 1:
            bounds = list(accumulate(self.probabilities[:-1]))
            drawn = bisect(bounds, generator.random())
        for i in range(len(self.sources)):
            source = self.sources[(drawn + i) % len(self.sources)]
            try:
                entries = _entries(source, members)
            except NoCaption as error:
                reasons.append(str(error))
            else:
                return entries[0] if len(entries) == 1 else entries[int(generator.random() * len(entries))]
        raise NoCaption("; ".join(reasons))


class _Lazily:
    """Random numbers of a generator that is made when the first is asked for: most samples need none."""

    def __init__(self, seed: Sequence[int]) -> None:
        self._seed = seed
        self._generator: np.random.Generator | None = None

    def random(self) -> float:
        if self._generator is None:
            self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((_DRAW, *self._seed))))
        return float(self._generator.random())


def _entries(source: Source, members: Members) -> list[str]:
    """The captions of one source, at least one; raises `NoCaption`."""
    if not source.field:
        return [_decoded(source, members.text(source.member))]
    document = members.document(source.member)
    if document is None:
        raise NoCaption(f"no caption: {source.member} is missing from the sample")
    value = document.get(source.field) if isinstance(document, Mapping) else None
    if value is None:
        raise NoCaption(f"no caption: {source.member} has no field {source.field}")
    texts = value if isinstance(value, list) else [value]
    entries = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not entries:
        wrong = any(not isinstance(text, str) and text is not None for text in texts)
        raise NoCaption(f"caption {source} is {'no text' if wrong else 'empty'}")
    return entries


def _decoded(source: Source, data: bytes | None) -> str:
    if data is None:
        raise NoCaption(f"no caption: {source} is missing from the sample")
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise NoCaption(f"caption is not UTF-8 (byte {error.start})") from error
    if not caption:
        raise NoCaption("caption is empty")
    return caption
