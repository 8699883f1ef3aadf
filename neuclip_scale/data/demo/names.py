"""Icon names to captions: one name for one concept whoever drew it, without vendors' own spellings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from neuclip_scale.data.demo.icons import Icon, IconSet
from neuclip_scale.data.demo.sources import NAMING, NameStyle

_TONE = re.compile(r"-?\b((?:medium-(?:light|dark)|medium|light|dark)-skin-tone)\b")
_BARE_TONE = re.compile(r"-(?:medium-light|medium-dark|medium|light|dark)$")
_TONE_OF_CODE = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium dark skin tone",
    "1f3ff": "dark skin tone",
}
_VARIANT = re.compile(r"-(?:flat|duo|alt|alternate|\d+)$")
_SIZE = re.compile(r"-(?:16|20|24|28|32|48)$")
_FLAG = re.compile(r"^flag-(?:for-)?(?:flag-)?(?!in-hole$)(?=.)")
_TRAIT = re.compile(r" (?=(?:curly|red|white|blond) hair$|beard$)")
_BALD = re.compile(r"^(\w+) bald$")
_PEOPLE = ("man ", "woman ", "person ")
_WORDS = {"womans": "woman's", "mans": "man's", "oclock": "o'clock", "blonde": "blond"}


@dataclass(frozen=True)
class Name:
    """`concept` is the caption without skin tone; `tones` the skin tones shown, in order (most icons have
    none).
    """

    concept: str
    tones: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """The words a model is trained on, for example "man cook, dark skin tone"."""
        return ", ".join((self.concept, *self.tones))


class Naming:
    """Names icons by what the sets in `NAMING` say: Unicode sequence -> name, other spelling -> name."""

    def __init__(self, icon_sets: Iterable[IconSet]) -> None:
        by_name = {icon_set.source.name: icon_set for icon_set in icon_sets}
        self._style: dict[str, NameStyle] = {name: s.source.style for name, s in by_name.items()}
        self._by_code: dict[str, str] = {}
        self._synonyms: dict[str, str] = {}
        reference = [by_name[name] for name in NAMING if name in by_name]
        for icon_set in reference:
            for icon in icon_set.icons:
                code, tones = _split_code(icon.code)
                if code and not tones:
                    self._by_code.setdefault(code, _unify_flag(icon.name))
        self._known = set(self._by_code.values())
        for icon_set in reference:
            canonical = {icon.name: self._by_code.get(_split_code(icon.code)[0]) for icon in icon_set.icons}
            spellings = [*((icon.name, icon.name) for icon in icon_set.icons), *icon_set.synonyms.items()]
            for spelling, icon_name in spellings:
                target, alias = canonical.get(icon_name), _unify_flag(spelling)
                if target and alias not in self._known:
                    self._synonyms.setdefault(alias, target)

    def name(self, icon: Icon) -> Name | None:
        """The icon's name; None where it has none in words (circle-flags' codes of regions and languages)."""
        style = self._style[icon.source]
        if style == "flags":
            flag = self._by_code.get(_country_code(icon.name))
            return Name(_words(flag)) if flag else None
        if style == "emoji":
            return self._emoji_name(icon)
        slug = icon.name
        if style == "sized":
            return Name(_words(_SIZE.sub("", slug)))
        while _VARIANT.search(slug):
            slug = _VARIANT.sub("", slug)
        if style == "numbered-emoji":
            if icon.category == "Flags" and "flag" not in slug:
                slug = f"flag-{slug}"
            slug = self._synonyms.get(slug, slug)
        return Name(_words(slug))

    def _emoji_name(self, icon: Icon) -> Name:
        code, tones = _split_code(icon.code)
        if code in self._by_code:
            return Name(_words(self._by_code[code]), tones)
        spelled = icon.name
        bare = _BARE_TONE.sub("", spelled)
        if bare != spelled and (bare in self._synonyms or bare in self._known):
            spelled += "-skin-tone"  # fluent-emoji-flat writes "ear-dark"
        tones = tones or tuple(match.replace("-", " ") for match in _TONE.findall(spelled))
        slug = _unify_flag(_TONE.sub("", spelled).strip("-"))
        if not slug:  # the swatch "medium-skin-tone" is a picture of the tone itself
            slug, tones = icon.name, ()
        return Name(_words(self._synonyms.get(slug, slug)), tones)


def _split_code(code: str) -> tuple[str, tuple[str, ...]]:
    """A Unicode sequence without skin tone modifiers and variation selectors, and the tones it had."""
    parts = [part for part in code.lower().split("-") if part not in ("", "fe0f")]
    if len(parts) == 1:
        return parts[0], ()
    tones = tuple(_TONE_OF_CODE[part] for part in parts if part in _TONE_OF_CODE)
    return "-".join(part for part in parts if part not in _TONE_OF_CODE), tones


def _country_code(name: str) -> str:
    """Two-letter country code to the pair of regional indicators that spells its flag."""
    if not re.fullmatch(r"[a-z]{2}", name):
        return ""
    return "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in name)


def _unify_flag(slug: str) -> str:
    return _FLAG.sub("flag-", slug)


def _words(slug: str) -> str:
    if _FLAG.match(slug):
        slug = slug.replace("flag-", "flag-of-", 1)
    words = " ".join(_WORDS.get(word, word) for word in slug.split("-") if word)
    if words.startswith(_PEOPLE):
        words = _BALD.sub(r"bald \1", _TRAIT.sub(" with ", words))
    return words
