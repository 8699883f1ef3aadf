"""Changed content: hashes, tiers of likeness, placeholders and mass changes against slow, obvious references."""

from __future__ import annotations

import math
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from planted_list import HIJACKED, STOCK, host_of
from planted_pictures import jpeg, opened, picture, placeholder, png, recompressed, resized, rewrapped
from planted_world import Download, PlantedWorld
from scipy.stats import binomtest

from neuclip_scale.audit import changes, mass_changes, placeholders
from neuclip_scale.audit.looks import Look, look_of
from neuclip_scale.audit.pictures import deep_scan
from neuclip_scale.data.decoding import decode_image
from neuclip_scale.queries.engines import Engine, EngineOptions

Table = Callable[..., Any]
TIER_OF = {
    "rewrapped": "identical",
    "recompressed": "recompressed",
    "resized": "resized",
    "different": "different",
    "placeholder": "different",
}
SHAS = [letter * 64 for letter in "abcd"]
STRINGS = pa.string()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(EngineOptions(num_threads=1, memory_limit="1GB"), tmp_path_factory.mktemp("engine")) as engine:
        yield engine


@pytest.fixture(scope="module")
def table(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Makes an Ibis table from rows; the columns of texts are named, as a list of nothing has no kinds."""
    folder, numbers = tmp_path_factory.mktemp("tables"), iter(range(10**9))

    def make(rows: list[dict[str, Any]], *texts: str) -> Any:
        columns = dict.fromkeys(texts, STRINGS)
        file = folder / f"{next(numbers)}.parquet"
        schema = pa.schema(columns.items()) if columns else None
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
        return engine.parquet([file])

    return make


def quick(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


uids = st.sampled_from(["u1", "u2", "u3", "u4", None])
hashes = st.sampled_from([*SHAS, SHAS[0].upper(), "", "md5", None])
records = st.lists(
    st.fixed_dictionaries(
        {
            "uid": uids,
            "url": st.sampled_from(["http://a.example/1", "http://B.example:80/2", "no url"]),
            "sha256": hashes,
            "status": st.sampled_from(["success", "failed_to_download"]),
        }
    ),
    max_size=8,
)


def only_hash(rows: list[dict[str, Any]], uid: str) -> str | None:
    found = {(row["sha256"] or "").lower() for row in rows if row["uid"] == uid}
    found = {sha for sha in found if len(sha) == 64 and set(sha) <= set(string.hexdigits)}
    return found.pop() if len(found) == 1 else None


@quick(40)
@given(published=records, attempts=records)
def test_verdicts_are_those_of_dictionaries(engine: Engine, table: Table, published: Any, attempts: Any) -> None:
    columns = ("uid", "url", "sha256", "status")
    listed = table([{k: v for k, v in row.items() if k != "status"} for row in published], *columns[:3])
    judged = changes.verdicts(listed, changes.originals(table(attempts, *columns)))
    fetched = [row for row in attempts if row["status"] == "success"]
    expected = {}
    for uid in {row["uid"] for row in published} & {row["uid"] for row in fetched} - {None}:
        before, after = only_hash(published, uid), only_hash(fetched, uid)
        expected[uid] = "unknown" if None in (before, after) else "same" if before == after else "changed"
    rows = engine.rows(judged)
    assert {row["uid"]: row["verdict"] for row in rows} == expected
    assert len(rows) == len(expected)
    counts = Counter(expected.values())
    assert changes.count_verdicts(engine, judged) == changes.ContentCounts(
        counts["same"], counts["changed"], counts["unknown"]
    )


def test_a_list_without_hashes_says_nothing_of_changes(engine: Engine, table: Table) -> None:
    listed = table([{"uid": "u1", "url": "http://a.example/1"}], "uid", "url")
    fetched = table([{"uid": "u1", "sha256": SHAS[0]}], "uid", "sha256")
    judged = changes.verdicts(listed, changes.originals(fetched))
    assert changes.count_verdicts(engine, judged) == changes.ContentCounts(0, 0, 1)


def row_of(uid: str, data: bytes, sha256: str | None, **more: Any) -> dict[str, Any]:
    look = vars(look_of(decode_image(data, 1 << 24)))
    width, height = opened(data).size
    return {"uid": uid, "decodes": True, "tar_sha256": str(hash(data)), "sha256": sha256, **look} | {
        "original_width": width,
        "original_height": height,
        **more,
    }


def ones(first: Look, second: Look) -> int:
    """In how many of 128 bits two looks differ."""
    pairs = [(first.phash, second.phash), (first.dhash, second.dhash)]
    return sum(bin((a ^ b) % (1 << 64)).count("1") for a, b in pairs)


def test_likeness_has_margins_on_both_sides() -> None:
    """Changed encodings stay far below the threshold, and other pictures far above."""
    seen = [look_of(picture(seed)) for seed in range(60)]
    most = 0
    for seed, look in enumerate(seen):
        data = jpeg(picture(seed))
        forms = [recompressed(data, 30), recompressed(data), resized(data, 0.3), resized(data), resized(data, 1.8)]
        most = max(most, *(ones(look, look_of(decode_image(form, 1 << 24))) for form in forms))
    least = min(ones(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert most <= changes.MAX_HASH_DISTANCE / 2
    assert least >= changes.MAX_HASH_DISTANCE * 1.2


@quick(15)
@given(pairs=st.lists(st.tuples(*[st.integers(-(1 << 63), (1 << 63) - 1)] * 2), min_size=1, max_size=30))
def test_distances_are_those_of_python(engine: Engine, table: Table, pairs: list[tuple[int, int]]) -> None:
    rows = table([{"a": a, "b": b} for a, b in pairs])
    found = engine.rows(rows.select("a", "b", n=changes.distance(rows.a, rows.b)))
    assert found
    assert all(row["n"] == bin((row["a"] ^ row["b"]) % (1 << 64)).count("1") for row in found)


def test_each_tier_is_told_from_the_others(engine: Engine, table: Table) -> None:
    data, flat = jpeg(picture(1)), [png(Image.new("RGB", (90, 90), (grey, grey, grey))) for grey in (30, 34, 200)]
    mirrored = jpeg(picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    unknown = {"original_width": None, "original_height": None}
    cases = {
        "identical": (data, rewrapped(data), {}),
        "recompressed": (data, recompressed(data), {}),
        "resized": (data, resized(data), {}),
        "resized, told by stored sizes": (data, resized(data), unknown),
        "recompressed, with stored sizes": (data, recompressed(data), unknown),
        "different": (data, jpeg(picture(2)), {}),
        "different, mirrored": (data, mirrored, {}),
        "different, another flat colour": (flat[0], flat[2], {}),
        "recompressed, nearly the same flat colour": (flat[0], flat[1], {}),
        "unseen, does not decode": (data, data, {"decodes": False}),
    }
    before = [row_of(name, first, SHAS[0]) for name, (first, _, _) in cases.items()]
    after = [row_of(name, second, SHAS[1], **more) for name, (_, second, more) in cases.items()]
    # Two versions of one uid in a download, and one that is nowhere: nothing can be said of either.
    before += [row_of("unseen, twice", data, SHAS[0]), row_of("unseen, twice", mirrored, SHAS[0])]
    after += [row_of("unseen, twice", data, SHAS[1]), row_of("unseen, nowhere", data, SHAS[1])]
    names = {row["uid"] for row in after}
    judged = table([{"uid": uid, "host": "h", "published_sha256": SHAS[0], "verdict": "changed"} for uid in names])
    first, second = changes.looks(table(before)), changes.looks(table(after))
    rows = engine.rows(changes.against_published(judged, second, [second, first]))
    assert {row["uid"]: row["tier"] for row in rows} == {uid: uid.partition(",")[0] for uid in names}
    assert len(rows) == len(names)
    counts = changes.count_tiers(engine, changes.against_published(judged, second, []))
    assert counts == changes.TierCounts(unseen=len(names))
    seen = {row["uid"]: row["tier"] for row in engine.rows(changes.between(first, second))}
    assert seen == {uid: uid.partition(",")[0] for uid in names if not uid.startswith("unseen")}


def test_downloads_without_hashes_are_compared_by_their_pixels(engine: Engine, table: Table) -> None:
    data = jpeg(picture(1))
    first = [row_of("same", data, None), row_of("other", data, None), row_of("known", data, SHAS[0])]
    second = [row_of("same", data, None), row_of("other", recompressed(data), SHAS[1]), row_of("known", data, SHAS[0])]
    found = changes.between(changes.looks(table(first)), changes.looks(table(second)))
    assert {row["uid"]: row["tier"] for row in engine.rows(found)} == {"other": "recompressed"}


contents = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.integers(0, 4), st.sampled_from(["x", "y"])), max_size=25
)


@quick(25)
@given(rows=contents, min_urls=st.integers(1, 4), captioned=st.booleans())
def test_placeholders_are_those_of_dictionaries(
    engine: Engine, table: Table, rows: list[Any], min_urls: int, captioned: bool
) -> None:
    samples = [
        {"uid": f"{i:03}", "url": f"http://{host}.example/{url}", "content": content, "text": f"t{caption}"}
        for i, (content, url, caption, host) in enumerate(rows)
    ]
    made = table(samples, "uid", "url", "content", "text")
    captions = made.select("uid", "text") if captioned else None
    found = placeholders.placeholder_samples(made.drop("text"), captions, min_urls)
    expected = defaultdict(list)
    for sample in samples:
        expected[sample["content"]].append(sample)
    groups = {
        content: members
        for content, members in expected.items()
        if len({member["url"] for member in members}) >= min_urls
        and (not captioned or len({member["text"] for member in members}) >= min_urls)
    }
    assert {row["uid"] for row in engine.rows(found)} == {m["uid"] for members in groups.values() for m in members}
    result = placeholders.find_placeholders(engine, found)
    assert (result.num_pictures, result.num_samples) == (len(groups), sum(map(len, groups.values())))
    assert [listed.content for listed in result.listed] == sorted(groups, key=lambda c: (-len(groups[c]), c))
    for listed in result.listed:
        members = groups[listed.content]
        hosts = Counter(host_of(member["url"]) for member in members)
        assert listed.hosts == tuple(sorted(hosts.items(), key=lambda pair: (-pair[1], pair[0])))
        assert listed.num_urls == len({member["url"] for member in members})
        assert listed.num_captions == (len({member["text"] for member in members}) if captioned else None)


def test_a_look_is_named_by_its_hashes_in_hexadecimal(engine: Engine, table: Table) -> None:
    data = placeholder()
    rows = [row_of(f"{i}", recompressed(data, 60 + i), SHAS[0]) for i in range(3)]
    seen = changes.looks(table(rows))
    urls = table([{"uid": f"{i}", "url": f"http://a.example/{i}"} for i in range(3)])
    named = engine.rows(placeholders.by_look(seen, urls))
    wanted = {row["uid"]: f"{row['phash'] % (1 << 64):016x}:{row['dhash'] % (1 << 64):016x}" for row in rows}
    assert {row["uid"]: row["content"] for row in named} == wanted


@quick(25)
@given(hosts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(0, 3)), max_size=6))
def test_mass_changes_are_those_of_scipy(engine: Engine, table: Table, hosts: list[tuple[int, int, int]]) -> None:
    rows = [
        {"uid": "u", "host": f"h{i}", "verdict": verdict}
        for i, counts in enumerate(hosts)
        for verdict, count in zip(("changed", "same", "unknown"), counts)
        for _ in range(count)
    ]
    found = mass_changes.find_mass_changes(engine, table(rows, "uid", "host", "verdict"))
    all_changed, all_checked = sum(c for c, _, _ in hosts), sum(c + s for c, s, _ in hosts)
    expected = {}
    for i, (changed, same, _) in enumerate(hosts):
        if changed >= mass_changes.MIN_CHANGED:
            bounds = binomtest(changed, changed + same).proportion_ci(0.999, "wilson")
            others = all_checked - changed - same
            elsewhere = (all_changed - changed) / others if others else 0.0
            if bounds.low > max(mass_changes.FACTOR * elsewhere, mass_changes.MIN_SHARE):
                expected[f"h{i}"] = (changed, bounds)
    assert {each.host: each.num_changed for each in found.listed} == {h: c for h, (c, _) in expected.items()}
    assert found.num_samples == sum(changed for changed, _ in expected.values())
    for each in found.listed:
        assert math.isclose(each.low, expected[each.host][1].low, abs_tol=1e-5)
        assert math.isclose(each.high, expected[each.host][1].high, abs_tol=1e-5)


def test_every_host_alike_is_no_mass_change(engine: Engine, table: Table) -> None:
    rows = [
        {"uid": "u", "host": f"h{i}", "verdict": "changed" if k < 40 else "same"} for i in range(9) for k in range(100)
    ]
    found = mass_changes.find_mass_changes(engine, table(rows))
    assert found.listed == ()
    assert found.overall_share == 0.4


class Judged:
    """What is found out about one of the two real downloads."""

    def __init__(self, engine: Engine, world: PlantedWorld, download: Download, folder: Path) -> None:
        self.world, self.fates = world, download.fates
        self.published = engine.parquet([world.published])
        self.originals = changes.originals(engine.parquet(sorted(download.folder.glob("*.parquet"))))
        verdicts = changes.verdicts(self.published, self.originals)
        looks = changes.looks(engine.parquet(deep_scan(download.folder, folder / "pictures", 1).files))
        engine.save(verdicts, folder / "verdicts.parquet")
        engine.save(looks, folder / "looks.parquet")
        self.verdicts, self.looks = (engine.parquet([folder / f"{name}.parquet"]) for name in ("verdicts", "looks"))


@pytest.fixture(scope="module")
def judged(engine: Engine, two_downloads: PlantedWorld, tmp_path_factory: pytest.TempPathFactory) -> list[Judged]:
    downloads = (two_downloads.first, two_downloads.second)
    return [Judged(engine, two_downloads, each, tmp_path_factory.mktemp("judged")) for each in downloads]


@pytest.mark.parametrize("number", [0, 1])
def test_real_downloads_every_planted_change_is_named_by_uid(engine: Engine, judged: list[Judged], number: int) -> None:
    found, other = judged[number], judged[1 - number]
    contents = {sample.uid: found.fates.content_of(sample.uid) for sample in found.world.samples}
    changed = {uid for uid, content in contents.items() if content not in ("", "same")}
    verdicts = {row["uid"]: row["verdict"] for row in engine.rows(found.verdicts)}
    assert {uid for uid, verdict in verdicts.items() if verdict == "changed"} == changed
    assert set(verdicts) == {uid for uid, content in contents.items() if content}
    assert "unknown" not in verdicts.values()
    tiers = changes.against_published(found.verdicts, found.looks, [other.looks])
    expected = {uid: TIER_OF[contents[uid]] if other.fates.content_of(uid) == "same" else "unseen" for uid in changed}
    assert {row["uid"]: row["tier"] for row in engine.rows(tiers)} == expected
    assert {"identical", "recompressed", "resized", "different"} <= set(expected.values())


def test_real_downloads_differ_where_either_changed(engine: Engine, judged: list[Judged]) -> None:
    rows = engine.rows(changes.between(judged[0].looks, judged[1].looks))
    expected = {}
    for sample in judged[0].world.samples:
        first, second = (each.fates.content_of(sample.uid) for each in judged)
        if first and second and (first, second) != ("same", "same"):
            expected[sample.uid] = TIER_OF[first if second == "same" else second]
    assert {row["uid"]: row["tier"] for row in rows} == expected


@pytest.mark.parametrize("deep", [False, True])
def test_real_downloads_show_their_placeholder(engine: Engine, judged: list[Judged], deep: bool) -> None:
    for each, expected in zip(judged, ("placeholder", "nothing")):
        table = placeholders.by_look(each.looks, each.originals) if deep else placeholders.by_bytes(each.originals)
        samples = placeholders.placeholder_samples(table, each.published)
        planted = {
            uid for uid, content in each.fates.content.items() if content == expected and each.fates.arrives(uid)
        }
        assert {row["uid"] for row in engine.rows(samples)} == planted
        listed = placeholders.find_placeholders(engine, samples).listed
        assert [found.hosts for found in listed] == ([((STOCK, len(planted)),)] if planted else [])


def test_real_downloads_show_the_hosts_that_changed_all(engine: Engine, judged: list[Judged]) -> None:
    for each, other, host in ((judged[0], judged[1], STOCK), (judged[1], judged[0], HIJACKED)):
        tiers = changes.against_published(each.verdicts, each.looks, [other.looks])
        found = mass_changes.find_mass_changes(engine, each.verdicts, tiers)
        assert [listed.host for listed in found.listed] == [host]
        of_host = [sample.uid for sample in each.world.samples if host_of(sample.url) == host]
        there = [uid for uid in of_host if each.fates.arrives(uid)]
        assert found.listed[0].num_changed == found.listed[0].num_checked == len(there)
        assert found.listed[0].num_different == sum(other.fates.content_of(uid) == "same" for uid in there)
