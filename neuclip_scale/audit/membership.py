"""The classes of samples: what is missing, orphaned, duplicated, ..., as queries over the table of fates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuclip_scale.audit import addresses
from neuclip_scale.audit.fates import is_there
from neuclip_scale.audit.identity import LISTED_UID
from neuclip_scale.audit.inputs import Inputs
from neuclip_scale.audit.reasons import REASONS
from neuclip_scale.queries.engines import Engine

CLASSES = {
    "missing": "wanted, and not there",
    "orphaned": "there or attempted, and not on the list",
    "duplicated": "there more than once",
    "corrupt": "in the tars, and at least one copy cannot be used",
    "failed": "attempted, and never with success",
    "never_attempted": "wanted, and in no parquet of the download",
    "lost": "downloaded with success, and not in the tars",
}
"""Of each download, with what they mean. Wanted is what the subset file asks for, else the whole list."""

KEPT = "neuclip_kept"
DOMAIN, TLD = "domain of the url", "top-level domain"
"""Names that no published list uses."""


class Membership:
    """Set algebra by uid over the fates."""

    def __init__(self, table: Any, inputs: Inputs, has_subset: bool, tells_all_attempts: Sequence[bool]) -> None:
        self.table = table
        self._tells_all_attempts = tells_all_attempts
        self._inputs = inputs
        self._wanted = table.requested > 0 if has_subset else table.listed > 0

    def conditions(self, i: int) -> dict[str, Any]:
        """For download i, the condition of each class that can be known."""
        table, download = self.table, self._inputs.downloads[i]
        there = is_there(table, i, download.has_tars)
        copies = table[f"in_tars_{i}" if download.has_tars else f"downloaded_{i}"]
        found = {
            "missing": self._wanted & ~there,
            "orphaned": (table.listed == 0) & ((table[f"in_tars_{i}"] > 0) | (table[f"attempted_{i}"] > 0)),
            "duplicated": copies > 1,
            "corrupt": table[f"corrupt_{i}"] > 0,
        }
        if download.has_attempts:
            found["failed"] = (table[f"attempted_{i}"] > 0) & (table[f"downloaded_{i}"] == 0)
            if self._tells_all_attempts[i]:
                found["never_attempted"] = self._wanted & (table[f"attempted_{i}"] == 0) & (table[f"in_tars_{i}"] == 0)
            if download.has_tars:
                found["lost"] = (table[f"downloaded_{i}"] > 0) & (table[f"in_tars_{i}"] == 0)
        return found

    def counts(self, engine: Engine, i: int) -> dict[str, int | None]:
        """Uids of each class of download i; None for what cannot be known."""
        table, download = self.table, self._inputs.downloads[i]
        shown: dict[str, Any] = {
            "listed": table.listed > 0,
            "listed_more_than_once": table.listed > 1,
            "wanted": self._wanted,
            "wanted_but_not_listed": self._wanted & (table.listed == 0),
            "attempted": table[f"attempted_{i}"] > 0,
            "downloaded": table[f"downloaded_{i}"] > 0,
            "in_tars": table[f"in_tars_{i}"] > 0,
            **self.conditions(i),
        }
        row = engine.rows(table.agg(**{name: each.cast("int64").sum() for name, each in shown.items()}))[0]
        counts: dict[str, int | None] = {name: int(row[name] or 0) for name in shown}
        unknown = [] if download.has_attempts else ["attempted", "downloaded"]
        unknown += [] if download.has_tars else ["in_tars", "corrupt"]
        return {**counts, **dict.fromkeys([*unknown, *(name for name in CLASSES if name not in counts)])}

    def classes(self, i: int) -> dict[str, Any]:
        """Queries for the lists of download i: `uid`, and `reason` where something is missing."""
        table, download, found = self.table, self._inputs.downloads[i], {}
        present = {
            "attempted": download.has_attempts,
            "downloaded": download.has_attempts,
            "in_tars": download.has_tars,
        }
        records = {name: table[f"{name}_{i}"] > 0 for name, is_known in present.items() if is_known}
        for name, condition in (records | self.conditions(i)).items():
            rows = self.table.filter(condition)
            reason = rows[f"reason_{i}"]
            found[name] = (
                rows.select("uid", reason=reason) if name in ("missing", "failed", "lost") else rows.select("uid")
            )
        return found

    def reasons(self, engine: Engine, i: int) -> list[tuple[str, int]]:
        """Why the missing samples of download i are missing, the most frequent first."""
        missing = self.table.filter(self.conditions(i)["missing"])
        rows = engine.rows(missing.group_by(reason=missing[f"reason_{i}"]).agg(count=missing.count()))
        return sorted(((row["reason"], row["count"]) for row in rows), key=lambda pair: (-pair[1], pair[0]))

    def usable(self, i: int) -> Any:
        """Whether download i has a copy that can be used."""
        if self._inputs.downloads[i].has_tars:
            return self.table[f"in_tars_{i}"] > self.table[f"corrupt_{i}"]
        return is_there(self.table, i, False)

    def pair(self, i: int, j: int) -> Any:
        """`uid`, `first`, `second`: whether the wanted samples can be used in downloads i and j."""
        table = self.table.mutate(first=self.usable(i), second=self.usable(j), wanted=self._wanted)
        return table.filter(table.wanted).select("uid", "first", "second")

    def common(self) -> Any:
        """Wanted samples that can be used in every download."""
        condition = self._wanted
        for i in range(len(self._inputs.downloads)):
            condition = condition & self.usable(i)
        return self.table.filter(condition).select("uid")

    def trained(self, j: int) -> Any:
        """Samples that run j saw, and how often."""
        seen = self.table.filter(self.table[f"trained_{j}"] > 0)
        return seen.select("uid", times=seen[f"trained_{j}"])

    def common_as_known(self, contents: Any) -> Any:
        """The common samples by what `neuclip reshard` knows them by in one download, whose `contents` these are."""
        usable = contents.filter(contents.fault.isnull()).semi_join(self.common(), "uid")
        return usable.group_by("uid").agg(own=usable.own.min()).select(uid="own").distinct()

    def untrained(self, i: int, j: int) -> Any:
        """Samples of download i that can be used and that run j did not see."""
        return self.table.filter(self.usable(i) & (self.table[f"trained_{j}"] == 0)).select("uid")

    def trained_counts(self, engine: Engine, i: int, j: int) -> dict[str, Any]:
        """Of run j: uids it saw, uids of its download it did not, and the spread of how often."""
        table, times = self.table, self.table[f"trained_{j}"]
        row = engine.rows(
            table.agg(
                trained=(times > 0).cast("int64").sum(),
                untrained=(self.usable(i) & (times == 0)).cast("int64").sum(),
                trained_but_not_wanted=((times > 0) & ~self._wanted).cast("int64").sum(),
                reads=times.sum(),
                most_often=times.max(),
            )
        )[0]
        return {name: int(value or 0) for name, value in row.items()}

    def wanted_and_usable(self, i: int) -> Any:
        """Wanted samples that can be used in download i."""
        return self.table.filter(self._wanted & self.usable(i)).select("uid")

    def retry(self, published: Any, i: int) -> Any:
        """The list's rows of missing samples that may come when asked for once more, with `reason` and the list's own
        uids: what is fetched is to be known by them."""
        passing = [name for name, reason in REASONS.items() if reason.is_passing]
        missing = self.table.filter(self.conditions(i)["missing"] & self.table[f"reason_{i}"].isin(passing))
        if "reason" in published.columns:
            published = published.rename(listed_reason="reason")
        rows = published.inner_join(missing.select("uid", reason=missing[f"reason_{i}"]), "uid")
        if LISTED_UID in rows.columns:
            rows = rows.mutate(uid=rows[LISTED_UID].fill_null(rows.uid)).drop(LISTED_UID)
        return rows

    def judged(self, published: Any, i: int) -> Any:
        """The list's rows of wanted samples, with `DOMAIN` and `TLD`, and in `KEPT` whether download i has each."""
        wanted = self.table.filter(self._wanted)
        if LISTED_UID in published.columns:
            published = published.drop(LISTED_UID)
        rows = published.inner_join(wanted.select("uid", **{KEPT: ~self.conditions(i)["missing"]}), "uid")
        if "url" not in rows.columns:
            return rows
        host = addresses.host(rows.url)
        return rows.mutate(**{DOMAIN: addresses.domain(host), TLD: addresses.top_level_domain(rows.url)})
