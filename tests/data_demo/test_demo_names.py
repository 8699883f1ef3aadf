"""Captions: one name for one concept, whatever each vendor calls it."""

from __future__ import annotations

import pytest

from neuclip_scale.data.demo.icons import Icon, IconSet
from neuclip_scale.data.demo.names import Name, Naming
from neuclip_scale.data.demo.sources import SOURCES

BY_NAME = {source.name: source for source in SOURCES}


def icon_set(source: str, codes: dict[str, str], synonyms: dict[str, str] | None = None) -> IconSet:
    icons = tuple(Icon(source, name, {"body": "<path/>"}, code) for name, code in codes.items())
    return IconSet(BY_NAME[source], source, "", "", "MIT", "", icons, synonyms or {})


@pytest.fixture(scope="module")
def naming() -> Naming:
    noto = {
        "deaf-man": "1f9cf-200d-2642",
        "ear": "1f442",
        "bullseye": "1f3af",
        "womans-hat": "1f452",
        "man-curly-hair": "1f468-200d-1f9b1",
        "flag-in-hole": "26f3",
    }
    twemoji = {
        "flag-germany": "1f1e9-1f1ea",
        "flag-for-flag-fiji": "1f1eb-1f1ef",
        "man-deaf": "1f9cf-200d-2642",
    }
    rest = [
        "fluent-emoji-flat",
        "emojione",
        "streamline-emojis",
        "streamline-color",
        "fluent-color",
        "circle-flags",
    ]
    return Naming(
        [
            icon_set("noto", noto, {"direct-hit": "bullseye"}),
            icon_set("twemoji", twemoji),
            *(icon_set(name, {}) for name in rest),
        ]
    )


@pytest.mark.parametrize(
    ("source", "name", "code", "caption"),
    [
        ("fluent-emoji-flat", "man-deaf", "1f9cf-200d-2642", "deaf man"),
        (
            "fluent-emoji-flat",
            "man-deaf-medium-light",
            "1f9cf-1f3fc-200d-2642",
            "deaf man, medium light skin tone",
        ),
        ("fluent-emoji-flat", "ear-dark", "", "ear, dark skin tone"),
        (
            "noto",
            "man-dark-skin-tone-curly-hair",
            "1f468-1f3ff-200d-1f9b1",
            "man with curly hair, dark skin tone",
        ),
        ("noto", "man-deaf-with-selector", "1f9cf-fe0f-200d-2642", "deaf man"),
        ("emojione", "direct-hit", "", "bullseye"),
        ("emojione", "flag-for-fiji", "", "flag of fiji"),
        ("emojione", "flag-for-flag-germany", "", "flag of germany"),
        ("emojione", "flag-in-hole", "", "flag in hole"),
        ("emojione", "womans-hat", "", "woman's hat"),
        ("emojione", "medium-skin-tone", "", "medium skin tone"),
        ("streamline-emojis", "direct-hit-2", "", "bullseye"),
        ("streamline-color", "shopping-cart-2-flat", "", "shopping cart"),
        ("fluent-color", "book-open-24", "", "book open"),
        ("circle-flags", "de", "", "flag of germany"),
    ],
)
def test_captions(naming: Naming, source: str, name: str, code: str, caption: str) -> None:
    named = naming.name(Icon(source, name, {}, code))
    assert named is not None
    assert named.caption == caption


def test_streamline_country_is_a_flag(naming: Naming) -> None:
    assert naming.name(Icon("streamline-emojis", "germany", {}, "", "Flags")) == Name("flag of germany")


def test_codes_without_words_have_no_name(naming: Naming) -> None:
    assert naming.name(Icon("circle-flags", "us-tx", {})) is None
    assert naming.name(Icon("circle-flags", "zz", {})) is None


def test_two_tones_are_both_kept_for_the_caller_to_judge(naming: Naming) -> None:
    named = naming.name(Icon("noto", "handshake", {}, "1faf1-1f3fb-200d-1faf2-1f3ff"))
    assert named is not None
    assert named.tones == ("light skin tone", "dark skin tone")
