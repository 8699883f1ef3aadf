"""Which pictures are trained on and which are kept for evaluation: a vendor and some names never meet
training.

Everything here is decided by hashes of names, so that the split does not depend on order, seeds or machines.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from neuclip_scale.data.demo.icons import Icon, IconSet
from neuclip_scale.data.demo.names import Name, Naming
from neuclip_scale.data.demo.rasterise import Picture
from neuclip_scale.data.demo.sources import HELD_OUT

NEAR_DUPLICATE_RMS = 12.0
"""Largest root-mean-square difference (of 255) of two 16 x 16 reductions that counts as the same drawing."""

MIN_VENDORS_OF_HELD_OUT_NAME = 3
MIN_SUPPORT_OF_WORD = 2


@dataclass(frozen=True)
class NamedIcon:
    """An icon, its name, and a uid that stays the same when its set publishes another version."""

    icon: Icon
    name: Name

    @property
    def uid(self) -> str:
        return stable_hash(f"iconify/{self.icon.source}/{self.icon.name}")


@dataclass(frozen=True)
class Drawn:
    """A named icon with its picture."""

    icon: Icon
    name: Name
    uid: str
    picture: Picture


@dataclass(frozen=True)
class Split:
    """The result: training pairs and the two query sets, each ordered by uid, and what was removed on the
    way.
    """

    train: list[Drawn]
    zero_shot: list[Drawn]
    retrieval: list[Drawn]
    removed: dict[str, int] = field(default_factory=dict)


def stable_hash(text: str) -> str:
    """32 hexadecimal digits of `text` (MD5: an identity, no secret)."""
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


def choose_icons(
    icon_sets: Iterable[IconSet], naming: Naming, num_concepts: int
) -> tuple[list[NamedIcon], dict[str, int]]:
    """The icons worth drawing and how many were left out, by reason; `num_concepts` > 0 keeps only so many
    names.

    Skin tones: a set draws most people five more times. One tone a name and set is kept, chosen by hash, so
    that all five tones and their words occur but two thirds of the pairs are not people; icons with several
    tones are dropped. The held-out vendor's are all dropped: its classes are concepts. Of one icon in several
    pixel sizes the largest is kept.
    """
    removed: Counter[str] = Counter()
    plain: list[NamedIcon] = []
    toned: dict[tuple[str, str], list[NamedIcon]] = defaultdict(list)
    sized: dict[tuple[str, str], list[NamedIcon]] = defaultdict(list)
    for icon_set in icon_sets:
        for icon in icon_set.icons:
            name = naming.name(icon)
            if name is None:
                removed["without_a_name_in_words"] += 1
            elif len(name.tones) > 1 or (name.tones and icon.source == HELD_OUT):
                removed["skin_tone_variants"] += 1
            elif name.tones:
                toned[icon.source, name.concept].append(NamedIcon(icon, name))
            elif icon_set.source.style == "sized":
                sized[icon.source, name.concept].append(NamedIcon(icon, name))
            else:
                plain.append(NamedIcon(icon, name))
    one_tone = [min(variants, key=lambda named: named.uid) for variants in toned.values()]
    largest = [max(sizes, key=_trailing_number) for sizes in sized.values()]
    removed["skin_tone_variants"] += sum(map(len, toned.values())) - len(one_tone)
    removed["smaller_sizes"] += sum(map(len, sized.values())) - len(largest)
    chosen = sorted((*plain, *one_tone, *largest), key=lambda named: named.uid)
    if num_concepts:
        concepts = sorted({named.name.concept for named in chosen}, key=stable_hash)[:num_concepts]
        kept = set(concepts)
        removed["beyond_the_limit"] = sum(named.name.concept not in kept for named in chosen)
        chosen = [named for named in chosen if named.name.concept in kept]
    return chosen, dict(removed)


def split(drawn: Sequence[Drawn], num_held_out_names: int) -> Split:
    """Divide `drawn` (ordered by uid) so that evaluation meets new pictures of known names and known vendors'
    new names.

    Zero-shot: pictures of the vendor `HELD_OUT`, whose names other vendors taught. Retrieval: one picture, by
    another vendor, for each of up to `num_held_out_names` names that no training pair has, made of words that
    other names have. Training pictures that equal or nearly equal a picture of either are removed, as are
    repeated ones.
    """
    removed: Counter[str] = Counter()
    visible = [item for item in drawn if not item.picture.blank]
    removed["blank"] = len(drawn) - len(visible)
    vendors = [item for item in visible if item.icon.source != HELD_OUT]
    held_out_names = choose_held_out_names(vendors, num_held_out_names)
    retrieval = _one_picture_per_name(vendors, held_out_names)
    candidates = [item for item in vendors if item.name.concept not in held_out_names]
    removed["other_pictures_of_held_out_names"] = len(vendors) - len(candidates) - len(retrieval)
    train = _without_repeats(candidates)
    removed["repeated_in_training"] = len(candidates) - len(train)
    test_vendor = [item for item in visible if item.icon.source == HELD_OUT]
    evaluation = [*test_vendor, *retrieval]
    exact = {item.picture.pixels_sha256 for item in evaluation}
    different = [item for item in train if item.picture.pixels_sha256 not in exact]
    removed["equal_to_an_evaluation_picture"] = len(train) - len(different)
    distance = nearest_rms(_thumbs(different), _thumbs(evaluation))
    train = [item for item, rms in zip(different, distance, strict=True) if rms >= NEAR_DUPLICATE_RMS]
    removed["nearly_equal_to_an_evaluation_picture"] = len(different) - len(train)
    taught = {item.name.concept for item in train if not item.name.tones}
    askable = [item for item in test_vendor if item.name.concept in taught]
    zero_shot = _without_repeats(askable)
    removed["held_out_vendor_untaught_names"] = len(test_vendor) - len(askable)
    # Norway's flag is also Svalbard's: nobody can tell such classes apart.
    removed["held_out_vendor_repeated"] = len(askable) - len(zero_shot)
    return Split(train, zero_shot, retrieval, dict(removed))


def choose_held_out_names(vendors: Iterable[Drawn], num_names: int) -> set[str]:
    """Names to keep from training: drawn by several vendors, each of their words occurring in other names
    that stay.

    Without the second condition retrieval would ask for words that the text tower never saw.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    for item in vendors:
        if not item.name.tones:
            sources[item.name.concept].add(item.icon.source)
    support = Counter(word for concept in sources for word in set(concept.split()))
    chosen: set[str] = set()
    for concept in sorted(sources, key=stable_hash):
        words = set(concept.split())
        if len(chosen) >= num_names:
            break
        enough = all(support[word] > MIN_SUPPORT_OF_WORD for word in words)
        if enough and len(sources[concept]) >= MIN_VENDORS_OF_HELD_OUT_NAME:
            chosen.add(concept)
            support.subtract(words)
    return chosen


def nearest_rms(thumbs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each row of `thumbs` [n, p] the smallest root-mean-square difference to a row of `others` [m, p],
    float32 [n].

    Values are 0 to 255; inf where `others` is empty. Works in blocks: no [n, m] matrix.
    """
    nearest = np.full(len(thumbs), np.inf, dtype=np.float32)
    if not len(others):
        return nearest
    squares = (others**2).sum(axis=1)
    for start in range(0, len(thumbs), 1024):
        block = thumbs[start : start + 1024]
        distance = (block**2).sum(axis=1)[:, None] + squares[None, :] - 2 * block @ others.T
        nearest[start : start + 1024] = np.sqrt(np.maximum(distance.min(axis=1), 0) / thumbs.shape[1])
    return nearest


def _thumbs(items: Sequence[Drawn]) -> np.ndarray:
    """Reductions as float32 rows, counted from white: icons are mostly white, small numbers lose less."""
    if not items:
        return np.zeros((0, 1), dtype=np.float32)
    return np.stack([255.0 - item.picture.thumb.reshape(-1) for item in items]).astype(np.float32)


def _one_picture_per_name(items: Iterable[Drawn], names: set[str]) -> list[Drawn]:
    first: dict[str, Drawn] = {}
    for item in items:
        if item.name.concept in names and not item.name.tones:
            first.setdefault(item.name.concept, item)
    return _without_repeats(first.values())


def _without_repeats(items: Iterable[Drawn]) -> list[Drawn]:
    first: dict[str, Drawn] = {}
    for item in items:
        first.setdefault(item.picture.pixels_sha256, item)
    return list(first.values())


def _trailing_number(named: NamedIcon) -> int:
    digits = re.search(r"\d+$", named.icon.name)
    return int(digits.group()) if digits else 0
