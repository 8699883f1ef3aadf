"""Every count and list of an audit against plain Python sets."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from audit_worlds import ERRORS, Shard, read_uids, uid_of, url_of, write_download, write_published
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from neuclip_scale.commands.audit import main

NUMBERS = st.integers(0, 30)
ATTEMPT = st.tuples(NUMBERS, st.one_of(st.none(), st.sampled_from(sorted(ERRORS))))
SAMPLE = st.tuples(NUMBERS, st.sampled_from([None, None, None, "no picture", "empty"]))
SHARD = st.builds(Shard, st.lists(ATTEMPT, max_size=12), st.lists(SAMPLE, max_size=12))
DOWNLOAD = st.lists(SHARD, min_size=1, max_size=3)


def audit(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Run the command in `folder`; its status and its document."""
    status = main(
        ["--manifest", f"{folder}/list.parquet", "--output", f"{folder}/out", "-j", "1", *map(str, arguments)]
    )
    return status, json.loads((folder / "out" / "audit.json").read_bytes())


def expected_classes(listed: list[int], shards: list[Shard]) -> dict[str, set[int]]:
    attempts = [attempt for shard in shards for attempt in shard.attempts]
    attempted = {n for n, _ in attempts}
    downloaded = {n for n, error in attempts if error is None}
    samples = [sample for shard in shards for sample in shard.in_tar]
    in_tars = {n for n, _ in samples}
    wanted = set(listed)
    return {
        "listed": wanted,
        "listed_more_than_once": {n for n, times in Counter(listed).items() if times > 1},
        "wanted": wanted,
        "attempted": attempted,
        "downloaded": downloaded,
        "in_tars": in_tars,
        "missing": wanted - in_tars,
        "orphaned": (in_tars | attempted) - wanted,
        "duplicated": {n for n, times in Counter(n for n, _ in samples).items() if times > 1},
        "corrupt": {n for n, fault in samples if fault},
        "failed": attempted - downloaded,
        "never_attempted": wanted - attempted - in_tars,
        "lost": downloaded - in_tars,
    }


def usable(shards: list[Shard]) -> set[int]:
    return {n for shard in shards for n, fault in shard.in_tar if fault is None}


def expected_reason(number: int, shards: list[Shard]) -> str:
    errors = [error for shard in shards for n, error in shard.attempts if n == number]
    if not errors:
        return "never_attempted"
    return "lost_from_tars" if None in errors else max(ERRORS[error] for error in errors if error)


def uids(numbers: set[int]) -> list[str]:
    return sorted(map(uid_of, numbers))


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example takes a second: shrinking would take minutes
)
@given(listed=st.lists(NUMBERS, min_size=1, max_size=30), first=DOWNLOAD, second=DOWNLOAD)
def test_counts_and_lists_are_those_of_sets(listed: list[int], first: list[Shard], second: list[Shard]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_published(folder / "list.parquet", listed)
        write_download(folder / "first", first)
        write_download(folder / "second", second)
        status, document = audit(folder, "--download", folder / "first", "--download", folder / "second")

        clean = True
        for part, shards, place in zip(document["downloads"], (first, second), ("", "second/")):
            expected = expected_classes(listed, shards)
            assert {name: part["counts"][name] for name in expected} == {n: len(e) for n, e in expected.items()}
            for kind in (
                "attempted",
                "downloaded",
                "in_tars",
                "missing",
                "orphaned",
                "duplicated",
                "corrupt",
                "failed",
                "never_attempted",
                "lost",
            ):
                path = folder / "out" / "lists" / f"{place}{kind}"
                assert read_uids(path) == uids(expected[kind])
                numbers = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids(expected[kind])]
                assert np.load(path.with_suffix(".npy")).tolist() == numbers
            reasons = Counter(expected_reason(n, shards) for n in expected["missing"])
            assert {name: reason["count"] for name, reason in part["reasons"].items()} == reasons
            clean &= not any(expected[kind] for kind in ("missing", "orphaned", "duplicated", "corrupt"))

        a, b = usable(first) & set(listed), usable(second) & set(listed)
        (pair,) = document["pairs"]
        assert (pair["common"], pair["only_first"], pair["only_second"]) == (len(a & b), len(a - b), len(b - a))
        assert pair["jaccard"] == (len(a & b) / len(a | b) if a | b else 1.0)
        assert read_uids(folder / "out/lists/common") == uids(a & b)
        assert read_uids(folder / "out/lists/only_second__not_first") == uids(b - a)
        assert status == (0 if clean and a == b else 1)


def test_where_adds_up_to_what_is_missing(tmp_path: Path) -> None:
    listed = [*range(60), 3]
    write_published(tmp_path / "list.parquet", listed)
    write_download(tmp_path / "d", [Shard([(n, None) for n in range(40)], [(n, None) for n in range(0, 40, 3)])])
    _, document = audit(tmp_path, "--download", tmp_path / "d")
    missing = set(listed) - set(range(0, 40, 3))
    places = {each["what"]: each for each in document["downloads"][0]["places"]}
    by_domain = Counter(f"host{n % 7}.example" for n in missing)
    totals = Counter(f"host{n % 7}.example" for n in set(listed))
    assert {row["name"]: row["lost"] for row in places["domain of the url"]["rows"]} == by_domain
    assert {row["name"]: row["total"] for row in places["domain of the url"]["rows"]} == totals
    assert [row["name"] for row in places["top-level domain"]["rows"]] == ["example"]
    assert places["day"]["rows"][0]["name"] == "2023-11-14"


def test_a_subset_says_what_is_wanted(tmp_path: Path) -> None:
    write_published(tmp_path / "list.parquet", list(range(20)))
    write_download(tmp_path / "d", [Shard([(n, None) for n in range(10)], [(n, None) for n in range(10)])])
    wanted = [5, 12, 99]
    (tmp_path / "wanted.txt").write_text("".join(f"{uid_of(n)}\n" for n in wanted))
    _, document = audit(tmp_path, "--download", tmp_path / "d", "--subset-file", tmp_path / "wanted.txt")
    counts = document["counts"]
    assert (counts["wanted"], counts["missing"], counts["wanted_but_not_listed"], counts["orphaned"]) == (3, 2, 1, 0)
    assert read_uids(tmp_path / "out/lists/missing") == uids({12, 99})


@pytest.mark.parametrize("kind", ["parquets", "tars"])
def test_what_is_not_given_is_said(tmp_path: Path, kind: str) -> None:
    write_published(tmp_path / "list.parquet", list(range(12)))
    shards = [Shard([(n, None if n % 2 else "timed out") for n in range(10)], [(n, None) for n in range(1, 10, 2)])]
    write_download(tmp_path / "d", shards, **{kind: False})
    status, document = audit(tmp_path, "--download", tmp_path / "d")
    counts = document["counts"]
    assert status == 1
    assert counts["missing"] == 7
    unknown = {"parquets": ("attempted", "downloaded"), "tars": ("in_tars", "corrupt", "lost")}[kind]
    assert [counts[name] for name in unknown] == [None] * len(unknown)
    assert any(("no parquet" if kind == "parquets" else "no tars") in note for note in document["notes"])


def test_without_uids_urls_tell_samples_apart(tmp_path: Path) -> None:
    lines = "".join(f"http://host{n % 7}.example/{n}.jpg\tcaption {n}\n" for n in range(10))
    (tmp_path / "cc12m.tsv").write_text(lines)
    write_download(tmp_path / "d", [Shard([(n, None) for n in range(8)], [(n, None) for n in range(6)])])
    arguments = ["--manifest", tmp_path / "cc12m.tsv", "--download", tmp_path / "d", "--output", tmp_path / "out"]
    assert main([*map(str, arguments), "-j", "1"]) == 1
    document = json.loads((tmp_path / "out/audit.json").read_bytes())
    assert document["identity"] == "url"
    assert document["counts"]["missing"] == 4
    assert {name: reason["count"] for name, reason in document["downloads"][0]["reasons"].items()} == {
        "lost_from_tars": 2,
        "never_attempted": 2,
    }


def test_what_is_asked_for_again_keeps_the_uid_of_the_list(tmp_path: Path) -> None:
    write_published(tmp_path / "list.parquet", list(range(10)))
    attempts: list[tuple[int, str | None]] = [(n, "timed out" if n > 6 else None) for n in range(10)]
    write_download(tmp_path / "d", [Shard(attempts, [(n, None) for n in range(7)])])
    arguments = ["--manifest", tmp_path / "list.parquet", "--download", tmp_path / "d", "--output", tmp_path / "out"]
    assert main([*map(str, arguments), "--identity", "url", "-j", "1"]) == 1
    rows = pq.read_table(tmp_path / "out/lists/retry.parquet").to_pylist()
    assert sorted(rows, key=lambda row: row["score"]) == [
        {"uid": uid_of(n), "url": url_of(n), "text": f"caption {n}", "score": n / 10, "reason": "timeout"}
        for n in (7, 8, 9)
    ]
    page = (tmp_path / "out/audit.html").read_text()
    assert "--save_additional_columns" in page
    missing = read_uids(tmp_path / "out/lists/missing")
    assert set(missing) == {hashlib.md5(url_of(n).encode()).hexdigest() for n in (7, 8, 9)}
