"""Content that changed behind its url: published hashes against those of the fetched bytes, then how much it shows.

A published sha256 is one of the bytes that the url gave, and is only ever compared with what img2dataset noted of the
bytes it fetched; the picture in a tar was encoded anew and has another. Where the bytes differ, `--deep` tells whether
that can be seen:

- `identical`: every decoded pixel is equal; other metadata, or a lossless encoding.
- `recompressed`: looks alike, in the same size.
- `resized`: looks alike, in another size.
- `different`: looks otherwise, which includes cropped, mirrored and recoloured pictures.
- `unseen`: one of the two pictures is in no download at hand, does not decode, or is there in several versions.

Alike means that of the 128 bits of both perceptual hashes (see `looks`) at most `MAX_HASH_DISTANCE` differ, and the
mean colour by at most `MAX_COLOUR_DISTANCE`. Of 500 photographs and drawings (Debian's tuxpaint-stamps) that holds for
99.6 % or more after JPEG of quality 30 to 80 or WebP, 99.4 % at half to one and a half times the size and 96 % at a
fifth; for 35 % after cutting 5 % off each edge, and for 13 of 124,750 pairs of two of them, near copies all. Downloads
that were resized alike are compared best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

from neuclip_scale.audit import addresses
from neuclip_scale.queries.engines import Engine

MAX_HASH_DISTANCE = 20
MAX_COLOUR_DISTANCE = 16
TIERS = ("identical", "recompressed", "resized", "different", "unseen")

_SHA256 = "^[0-9a-f]{64}$"
_LOOK = ("pixel_hash", "phash", "dhash", "red", "green", "blue", "width", "height", "original_width", "original_height")


@dataclass(frozen=True)
class ContentCounts:
    """Samples of the list that were downloaded, by what their hash says."""

    same: int
    changed: int
    unknown: int
    """The list or the download has no hash, or several that differ."""


@dataclass(frozen=True)
class TierCounts:
    """Samples whose bytes differ, by how much that shows."""

    identical: int = 0
    recompressed: int = 0
    resized: int = 0
    different: int = 0
    unseen: int = 0


def originals(table: Any) -> Any:
    """One row a uid of what was fetched: `uid`, `sha256` (null unless there is exactly one), `url` if `table` has it.

    `table` has `uid` and `sha256` of the original bytes, and may have `status`, of which only successes count: the
    attempts or the contents of a download, or the published list.
    """
    if "status" in table.columns:
        table = table.filter(table.status == "success")
    table = table.filter(table.uid.notnull())
    import ibis

    sha256 = table.sha256.cast("string").lower() if "sha256" in table.columns else ibis.null("string")
    table = table.mutate(sha256=ibis.ifelse(sha256.re_search(_SHA256), sha256, ibis.null("string")))
    urls = {"url": table.url.min()} if "url" in table.columns else {}
    found = table.group_by("uid").agg(sha256=table.sha256.min(), last=table.sha256.max(), **urls)
    return found.mutate(sha256=ibis.ifelse(found.sha256 == found.last, found.sha256, ibis.null("string"))).drop("last")


def verdicts(published: Any, fetched: Any) -> Any:
    """One row for each uid that was published and fetched: `uid`, `host`, `published_sha256`, `verdict`.

    `published` has `uid`, `url` and mostly `sha256`; `fetched` is a table of `originals`. The verdict is `same`,
    `changed` or `unknown`.
    """
    import ibis

    before = originals(published).rename(published_sha256="sha256")
    both = before.join(fetched.select("uid", "sha256"), "uid")
    equal = both.published_sha256 == both.sha256
    verdict = ibis.cases((equal.isnull(), "unknown"), (equal, "same"), else_="changed")
    return both.select("uid", "published_sha256", host=addresses.host(both.url), verdict=verdict)


def count_verdicts(engine: Engine, table: Any) -> ContentCounts:
    """Of a table of `verdicts`."""
    return ContentCounts(**_counts(engine, table, "verdict", ("same", "changed", "unknown")))


def looks(pictures: Any) -> Any:
    """One row a uid of what was decoded: `uid`, `sha256` of the original bytes, and what `looks.Look` has.

    `pictures` is what `pictures.deep_scan` wrote. A uid with pictures that differ, or do not decode, is left out.
    """
    twice = ("tar_sha256", "sha256", "original_width", "original_height")
    found = pictures.group_by("uid").agg(
        broken=(~pictures.decodes).cast("int64").sum(),
        tar_sha256=pictures.tar_sha256.min(),
        sha256=pictures.sha256.min(),
        **{name: pictures[name].min() for name in _LOOK},
        **{f"last_{name}": pictures[name].max() for name in twice},
    )
    differs = reduce(lambda left, right: left | right, [found[name] != found[f"last_{name}"] for name in twice])
    return found.filter((found.broken == 0) & ~differs.fill_null(False)).select("uid", "sha256", *_LOOK)


def against_published(judged: Any, found: Any, references: Sequence[Any]) -> Any:
    """One row for each changed uid of `judged` (see `verdicts`): `uid`, `host`, `tier`.

    `found` are the `looks` of the download, `references` those of downloads that may hold the published content: a
    picture is taken from them when its original bytes have the published hash.
    """
    changed = judged.filter(judged.verdict == "changed").select("uid", "host", "published_sha256")
    if not references:
        return _tiers(changed, None, found)
    kept = [
        reference.join(changed.select("uid", "published_sha256"), "uid").filter(
            lambda row: row.sha256 == row.published_sha256
        )
        for reference in references
    ]
    pool = reduce(lambda left, right: left.union(right), [table.select("uid", *_LOOK) for table in kept])
    # Downloads with other settings show one picture in two sizes: any of them will do, but all of one row.
    pool = pool.group_by("uid").agg(**{name: pool[name].argmin(pool.pixel_hash) for name in _LOOK})
    return _tiers(changed, pool, found)


def between(first: Any, second: Any) -> Any:
    """One row for each uid that two downloads (see `looks`) have with other original bytes: `uid`, `tier`.

    Where a download has no hash of the original bytes, its picture counts as another unless its pixels are equal.
    """
    there = second.select("uid", other_sha256="sha256", other_pixels="pixel_hash")
    both = first.select("uid", "sha256", "pixel_hash").join(there, "uid")
    equal = (both.sha256 == both.other_sha256).fill_null(both.pixel_hash == both.other_pixels)
    return _tiers(both.filter(~equal).select("uid"), first, second)


def count_tiers(engine: Engine, table: Any) -> TierCounts:
    """Of a table with a column `tier`."""
    return TierCounts(**_counts(engine, table, "tier", TIERS))


def _tiers(changed: Any, before: Any | None, after: Any) -> Any:
    """`changed` with a column `tier`; the tables of looks have at most one row a uid."""
    import ibis

    if before is None:
        return changed.mutate(tier=ibis.literal("unseen")).drop(*({"published_sha256"} & set(changed.columns)))
    columns = [name for name in changed.columns if name != "published_sha256"]
    for prefix, table in (("a", before), ("b", after)):
        side = table.select(**{f"{prefix}_uid": table.uid}, **{f"{prefix}_{name}": table[name] for name in _LOOK})
        changed = changed.left_join(side, changed.uid == side[f"{prefix}_uid"])
    return changed.mutate(tier=_tier(changed)).select(*columns, "tier")


def _tier(pairs: Any) -> Any:
    """From `a_` and `b_` columns; null on either side is `unseen`."""
    import ibis

    def differ(*names: str) -> Any:
        return reduce(lambda left, right: left | right, [pairs[f"a_{name}"] != pairs[f"b_{name}"] for name in names])

    far = distance(pairs.a_phash, pairs.b_phash) + distance(pairs.a_dhash, pairs.b_dhash)
    near = [far <= MAX_HASH_DISTANCE] + [
        (pairs[f"a_{name}"].cast("int64") - pairs[f"b_{name}"].cast("int64")).abs() <= MAX_COLOUR_DISTANCE
        for name in ("red", "green", "blue")
    ]
    alike = reduce(lambda left, right: left & right, near)
    # Originals of a size are known where the json tells it; else the sizes of what was stored must do.
    resized = differ("original_width", "original_height").fill_null(differ("width", "height"))
    return ibis.cases(
        (pairs.a_pixel_hash.isnull() | pairs.b_pixel_hash.isnull(), "unseen"),
        (~alike, "different"),
        (resized, "resized"),
        (pairs.a_pixel_hash == pairs.b_pixel_hash, "identical"),
        else_="recompressed",
    )


def distance(first: Any, second: Any) -> Any:
    """In how many of 64 bits two columns of hashes differ."""
    return _bit_count()(first ^ second).cast("int64")


@cache
def _bit_count() -> Any:
    import ibis

    @ibis.udf.scalar.builtin
    def bit_count(value: int) -> int:  # type: ignore[empty-body]
        """Ones among the bits: DuckDB and Spark call it so, Ibis has no name for it."""

    return bit_count


def _counts(engine: Engine, table: Any, column: str, names: Sequence[str]) -> dict[str, int]:
    found = {row["name"]: row["n"] for row in engine.rows(table.group_by(name=table[column]).agg(n=table.count()))}
    return {name: int(found.get(name, 0)) for name in names}
