"""The split: nothing of the evaluation may be learned in training."""

from __future__ import annotations

import hashlib

import numpy as np
from demo_helpers import make_icon

from neuclip_scale.data.demo.names import Name
from neuclip_scale.data.demo.rasterise import Picture
from neuclip_scale.data.demo.selection import (
    NEAR_DUPLICATE_RMS,
    Drawn,
    choose_held_out_names,
    nearest_rms,
    split,
    stable_hash,
)
from neuclip_scale.data.demo.sources import HELD_OUT

VENDORS = ("noto", "openmoji", "emojione")


def drawn(source: str, concept: str, thumb: np.ndarray, tones: tuple[str, ...] = ()) -> Drawn:
    picture = Picture(b"", hashlib.sha256(thumb.tobytes()).hexdigest(), thumb, blank=False)
    uid = stable_hash(f"{source}{concept}{tones}")
    return Drawn(make_icon("<path/>", source, concept), Name(concept, tones), uid, picture)


def world(seed: int = 0) -> list[Drawn]:
    """Forty two-word names by three training vendors and the held-out one, each picture random."""
    random = np.random.default_rng(seed)
    names = [
        f"{a} {b}"
        for a in ("red", "blue", "old", "new", "big")
        for b in ["cat", "dog", "car", "box", "pen", "cup", "hat", "key"]
    ]
    return [
        drawn(vendor, name, random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        for name in names
        for vendor in (*VENDORS, HELD_OUT)
    ]


def test_vendor_and_names_never_meet_training() -> None:
    items = world()
    parts = split(items, 6)
    held_out = {item.name.concept for item in parts.retrieval}
    assert len(parts.retrieval) == len(held_out) == 6
    assert not held_out & {item.name.concept for item in parts.train}
    assert all(item.icon.source != HELD_OUT for item in [*parts.train, *parts.retrieval])
    assert all(item.icon.source == HELD_OUT for item in parts.zero_shot)
    assert {item.name.concept for item in parts.zero_shot} <= {item.name.concept for item in parts.train}
    assert len(parts.zero_shot) == 34
    assert len(parts.train) == 34 * 3
    assert parts.removed["other_pictures_of_held_out_names"] == 12


def test_words_of_held_out_names_occur_in_training() -> None:
    parts = split(world(), 6)
    words = {word for item in parts.train for word in item.name.concept.split()}
    assert all(set(item.name.concept.split()) <= words for item in parts.retrieval)


def test_rare_words_and_rare_names_are_not_held_out() -> None:
    thumb = np.zeros((16, 16, 3), np.uint8)
    unique = [drawn(vendor, "unique thing", thumb) for vendor in VENDORS]
    lonely = [drawn("noto", f"red {word}", thumb) for word in ("cat", "dog", "car", "red")]
    assert choose_held_out_names([*unique, *lonely], 10) == set()


def test_tones_of_held_out_names_leave_training_too() -> None:
    items = world()
    name = next(iter(choose_held_out_names((i for i in items if i.icon.source != HELD_OUT), 1)))
    toned = drawn("noto", name, np.full((16, 16, 3), 7, np.uint8), ("dark skin tone",))
    assert toned.uid not in {item.uid for item in split([*items, toned], 1).train}


def test_equal_near_and_repeated_pictures_are_removed() -> None:
    items = world()
    test_picture = next(item for item in items if item.icon.source == HELD_OUT).picture.thumb
    nearly = test_picture.copy()
    nearly[0, 0] ^= 8
    fresh = np.full((16, 16, 3), 128, np.uint8)
    extra = [
        drawn("noto", "copied cat", test_picture),
        drawn("noto", "nearly cat", nearly),
        drawn("noto", "first twin", fresh),
        drawn("openmoji", "second twin", fresh),
    ]
    removed = split([*items, *extra], 0).removed
    assert removed["equal_to_an_evaluation_picture"] == 1
    assert removed["nearly_equal_to_an_evaluation_picture"] == 1
    assert removed["repeated_in_training"] == 1


def test_classes_with_one_picture_are_asked_once() -> None:
    random = np.random.default_rng(1)
    same = np.full((16, 16, 3), 99, np.uint8)
    items = [
        drawn("noto", name, random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for name in ("norway", "svalbard")
    ]
    parts = split([*items, drawn(HELD_OUT, "norway", same), drawn(HELD_OUT, "svalbard", same)], 0)
    assert len(parts.zero_shot) == 1
    assert parts.removed["held_out_vendor_repeated"] == 1


def test_nearest_rms_against_brute_force() -> None:
    random = np.random.default_rng(2)
    a = random.integers(0, 256, (1500, 48)).astype(np.float32)
    b = random.integers(0, 256, (37, 48)).astype(np.float32)
    expected = np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).mean(-1)).min(1)
    np.testing.assert_allclose(nearest_rms(a, b), expected, atol=0.02)
    assert np.all(nearest_rms(a, b[:0]) > NEAR_DUPLICATE_RMS)
