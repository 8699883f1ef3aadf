"""Placeholder pictures: one picture behind many urls whose captions tell of different things."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from neuclip_scale.audit import addresses
from neuclip_scale.queries.engines import Engine

MIN_URLS = 5
"""Fewer urls with one picture are common: a shop's product, a newspaper's photograph."""

MAX_LISTED = 200
_MAX_HOSTS = 5


@dataclass(frozen=True)
class Placeholder:
    """One picture behind many urls."""

    content: str
    """The sha256 of the bytes, or the look as `PHASH:DHASH` in hexadecimal digits."""
    num_samples: int
    num_urls: int
    num_captions: int | None
    """Captions that differ; None where captions are not known."""
    num_hosts: int
    hosts: tuple[tuple[str, int], ...]
    """Those with most samples, and how many."""
    example: str
    """One of the uids."""


@dataclass(frozen=True)
class Placeholders:
    """Those with most samples, and the sum of all."""

    listed: tuple[Placeholder, ...]
    num_pictures: int
    num_samples: int


def by_bytes(fetched: Any) -> Any:
    """`uid`, `url`, `content` for `find_placeholders`: of `changes.originals` with urls, by their sha256."""
    return fetched.filter(fetched.sha256.notnull()).select("uid", "url", content="sha256")


def by_look(seen: Any, urls: Any) -> Any:
    """`uid`, `url`, `content`: of `changes.looks`, by both perceptual hashes, with the urls of `urls` (`uid`, `url`).

    Finds a placeholder whose bytes differ at each request. Pictures of nothing but one flat colour look all alike.
    """
    named = seen.mutate(content=_hexadecimal(seen.phash) + ":" + _hexadecimal(seen.dhash))
    return named.join(urls.select("uid", "url"), "uid").select("uid", "url", "content")


def placeholder_samples(table: Any, captions: Any | None = None, min_urls: int = MIN_URLS) -> Any:
    """The samples of `table` (`uid`, `url`, `content`) that show a placeholder: those columns, `host` and `caption`.

    A placeholder is a content behind at least `min_urls` urls and, where `captions` (`uid`, `text`) are known, with as
    many different captions.
    """
    import ibis

    # Counting rows is cheap for any number of contents; counting what differs is for the few that are left.
    frequent = table.group_by("content").agg(n=table.count())
    some = table.semi_join(frequent.filter(frequent.n >= min_urls), "content")
    spread = some.group_by("content").agg(urls=some.url.nunique())
    found = some.semi_join(spread.filter(spread.urls >= min_urls), "content")
    found = found.mutate(host=addresses.host(found.url))
    if captions is None:
        return found.mutate(caption=ibis.null("string"))
    texts = captions.group_by("uid").agg(caption=captions.text.cast("string").min())
    found = found.left_join(texts, "uid").select("uid", "url", "content", "host", "caption")
    varied = found.group_by("content").agg(captions=found.caption.nunique())
    return found.semi_join(varied.filter(varied.captions >= min_urls), "content")


def find_placeholders(engine: Engine, samples: Any) -> Placeholders:
    """Sums and the longest groups of `placeholder_samples`."""
    import ibis

    groups = samples.group_by("content").agg(
        num_samples=samples.count(),
        num_urls=samples.url.nunique(),
        num_captions=samples.caption.nunique(),
        num_hosts=samples.host.nunique(),
        example=samples.uid.min(),
    )
    total = engine.rows(groups.agg(pictures=groups.count(), samples=groups.num_samples.sum()))[0]
    rows = engine.rows(groups.order_by([ibis.desc("num_samples"), "content"]).limit(MAX_LISTED))
    hosts = _hosts(engine, samples, [row["content"] for row in rows])
    listed = tuple(
        Placeholder(**{**row, "num_captions": row["num_captions"] or None}, hosts=hosts[row["content"]]) for row in rows
    )
    return Placeholders(listed, total["pictures"], total["samples"] or 0)


def _hosts(engine: Engine, samples: Any, contents: list[str]) -> dict[str, tuple[tuple[str, int], ...]]:
    import ibis

    if not contents:
        return {}
    some = samples.filter(samples.content.isin(contents))
    counted = some.group_by("content", "host").agg(n=some.count())
    place = ibis.row_number().over(group_by=counted.content, order_by=[ibis.desc(counted.n), counted.host])
    rows = engine.rows(counted.mutate(place=place).filter(lambda row: row.place < _MAX_HOSTS))
    rows.sort(key=lambda row: row["place"])
    return {
        content: tuple((row["host"], row["n"]) for row in rows if row["content"] == content) for content in contents
    }


def _hexadecimal(column: Any) -> Any:
    """16 digits of a signed 64-bit number, its two's complement."""
    return _hex()(column.cast("int64")).lower().lpad(16, "0")


@cache
def _hex() -> Any:
    import ibis

    @ibis.udf.scalar.builtin
    def hex(value: int) -> str:  # type: ignore[empty-body]
        """DuckDB and Spark call it so, Ibis has no name for it."""

    return hex
