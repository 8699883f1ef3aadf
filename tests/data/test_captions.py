"""Captions from members and JSON fields, one or several."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import make_loader, take

from neuclip_scale.config import ConfigError, DataConfig, check_recipe, load_recipe
from neuclip_scale.data import captions
from neuclip_scale.data.cache import cache_of
from neuclip_scale.data.captions import Captions, Members, NoCaption
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.samples import SampleReader, UnusableSample
from neuclip_scale.data.shards import write_shard

UID = "0123456789abcdef0123456789abcdef"


def members(**texts: Any) -> Members:
    data = {key: value if isinstance(value, bytes) else json.dumps(value).encode() for key, value in texts.items()}
    return Members(data.get)


def choose(texts: Members, seed: tuple[int, ...] = (0,), **options: Any) -> str:
    return Captions.of(DataConfig(**options)).choose(texts, seed)


def reader_of(manifest: Manifest, section: DataConfig) -> SampleReader:
    return SampleReader(
        manifest,
        image_keys=("jpg",),
        captions=Captions.of(section),
        max_cached_samples=10,
        cache=cache_of(section),
    )


def test_one_source() -> None:
    texts = members(txt=b" a cat\n", json={"caption": "a dog ", "syn": ["one", "", None, "two"]})
    assert choose(texts) == "a cat"
    assert choose(texts, caption_key="TXT") == "a cat"
    assert choose(texts, caption_key="json:caption") == "a dog"
    assert {choose(texts, (i,), caption_key="json:syn") for i in range(30)} == {"one", "two"}


@pytest.mark.parametrize(
    ("texts", "place", "reason"),
    [
        ({}, "txt", "no caption: txt is missing from the sample"),
        ({"txt": b" \n"}, "txt", "caption is empty"),
        ({"txt": b"\xff"}, "txt", "caption is not UTF-8 (byte 0)"),
        ({}, "json:caption", "no caption: json is missing from the sample"),
        ({"json": b"{"}, "json:caption", "json is not JSON"),
        ({"json": b"[" * 100_000}, "json:caption", "json is not JSON"),
        ({"json": [1]}, "json:caption", "no caption: json has no field caption"),
        ({"json": {"caption": None}}, "json:caption", "no caption: json has no field caption"),
        ({"json": {"caption": 3}}, "json:caption", "caption json:caption is no text"),
        ({"json": {"caption": ""}}, "json:caption", "caption json:caption is empty"),
        ({"json": {"caption": []}}, "json:caption", "caption json:caption is empty"),
    ],
)
def test_why_there_is_none(texts: dict[str, Any], place: str, reason: str) -> None:
    with pytest.raises(NoCaption) as caught:
        choose(members(**texts), caption_key=place)
    assert str(caught.value) == reason


def test_sources_are_drawn_with_their_weights() -> None:
    texts = members(txt=b"alt", json={"syn": ["a", "b", "c", "d"]})
    options = {"captions": ("txt", "json:syn"), "caption_weights": (1.0, 4.0)}
    drawn = Counter(choose(texts, (7, 2, position), **options) for position in range(5000))
    expected = {"alt": 1000, "a": 1000, "b": 1000, "c": 1000, "d": 1000}
    assert set(drawn) == set(expected)
    assert all(abs(drawn[caption] - number) < 5 * 1000**0.5 for caption, number in expected.items())
    again = Counter(choose(texts, (7, 2, position), **options) for position in range(5000))
    assert again == drawn
    equal = Counter(choose(texts, (i,), captions=("txt", "json:syn"))[:3] == "alt" for i in range(2000))
    assert abs(equal[True] - 1000) < 150


def test_a_missing_source_gives_way_to_the_next_that_is_there() -> None:
    options = {"captions": ("txt", "json:a", "json:b"), "caption_weights": (1.0, 1.0, 1.0)}
    drawn = Counter(choose(members(txt=b"t", json={"b": "b"}), (i,), **options) for i in range(3000))
    assert abs(drawn["b"] - 2000) < 150  # drawn itself, or in the place of json:a
    spare = {"captions": ("json:a", "txt"), "caption_weights": (1.0, 0.0)}
    assert {choose(members(txt=b"t", json={"a": "a"}), (i,), **spare) for i in range(50)} == {"a"}
    assert choose(members(txt=b"t"), **spare) == "t"
    with pytest.raises(NoCaption, match=r"json:b is empty.*|.*txt is missing.*; .*"):
        choose(members(json={"b": ""}), **options)


def test_the_json_is_read_and_parsed_once(
    tmp_path: Path, damaged_manifest: Callable[[], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.dumps({"uid": UID, "syn": ["one", "two"]})
    write_shard(tmp_path / "0.tar", [{"__key__": "k", "jpg": b"", "json": document}])
    parsed = []
    loads = json.loads
    monkeypatch.setattr(captions.json, "loads", lambda data: parsed.append(data) or loads(data))
    section = DataConfig(captions=("txt", "json:other", "json:syn"))
    reader = SampleReader(
        damaged_manifest(),
        image_keys=("jpg",),
        captions=Captions.of(section),
        max_cached_samples=10,
        cache=cache_of(section),
    )
    raw = reader.read(0, (1,))
    assert (raw.caption in ("one", "two"), raw.uid, len(parsed)) == (True, UID, 1)


def test_a_sample_without_any_caption_is_unusable(tmp_path: Path, damaged_manifest: Callable[[], Manifest]) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "k", "jpg": b"", "json": "{}"}])
    section = DataConfig(captions=("txt", "json:syn"))
    reader = SampleReader(
        damaged_manifest(),
        image_keys=("jpg",),
        captions=Captions.of(section),
        max_cached_samples=10,
        cache=cache_of(section),
    )
    with pytest.raises(UnusableSample, match="txt is missing from the sample"):
        reader.read(0)


def test_the_draw_depends_on_no_rank_or_worker_and_leaves_augmentation_alone(clean_manifest: Manifest) -> None:
    options = {"captions": ("txt", "json:key"), "caption_weights": (1.0, 1.0)}
    whole = take(make_loader(clean_manifest, **options), 6)
    for world_size, workers in ((2, 0), (4, 1), (1, 3)):
        ranks = [
            take(make_loader(clean_manifest, rank=r, world_size=world_size, num_workers=workers, **options), 6)
            for r in range(world_size)
        ]
        for step, expected in enumerate(whole):
            tokens = torch.cat([rank[step].batch.tokens for rank in ranks])
            assert torch.equal(tokens, expected.batch.tokens)
    alone = take(make_loader(clean_manifest), 6)
    for step, expected in zip(whole, alone):
        assert torch.equal(step.batch.images, expected.batch.images)
        assert step.batch.uids == expected.batch.uids
    same = [torch.equal(a, b) for step, ref in zip(whole, alone) for a, b in zip(step.batch.tokens, ref.batch.tokens)]
    assert 0.3 < sum(same) / len(same) < 0.7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.caption_key='json:'", r"data\.caption_key = 'json:'"),
        ("data.captions=['', txt]", r"data\.captions = ''"),
        ("data.caption_weights=[1]", r"1 weight\(s\) for 0 place"),
        ("data.captions=[a, b]|data.caption_weights=[0, 0]", "not frequencies"),
        ("data.captions=[a, b]|data.caption_weights=[1, -1]", "not frequencies"),
        ("data.captions=[a, b]|data.caption_key=c", r"Move it into data\.captions"),
    ],
)
def test_what_a_recipe_may_not_say(override: str, message: str) -> None:
    recipe = load_recipe("demo", override.split("|"))
    with pytest.raises(ConfigError, match=message):
        check_recipe(recipe)


def test_good_recipes_pass() -> None:
    check_recipe(load_recipe("demo", ["data.captions=[txt, json:syn]", "data.caption_weights=[1, 3]"]))
    check_recipe(load_recipe("demo", ["data.caption_key=json:caption"]))
