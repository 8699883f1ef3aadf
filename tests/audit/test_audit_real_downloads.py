"""What the audit says of two downloads by real img2dataset: every planted fault by uid, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from planted_list import HIJACKED, SHARD_SIZE, STOCK
from planted_world import Download, PlantedWorld

from neuclip_scale.commands.audit import main

REASONS = {
    "not_found": ("http_404", "http_410"),
    "forbidden": ("http_401", "http_403", "http_403_robots"),
    "rate_limited": ("http_429",),
    "server_error": ("http_500", "http_503"),
    "bad_request": ("redirect_loop",),
    "opted_out": ("robots",),
    "timeout": ("timeout", "timeout_body", "timeout_connect"),
    "dead_host": ("refused",),
    "dns": ("no_such_host",),
    "resolver": ("resolver",),
    "reset": ("reset", "silent", "cut"),
    "tls": ("tls_plain", "tls_expired", "tls_self_signed", "tls_misnamed"),
    "bad_url": ("url_space", "url_no_scheme", "url_no_host", "url_not_ascii", "url_port"),
    "not_decoded": ("corrupt", "html", "empty", "bomb"),
    "too_small": ("too_small",),
    "bad_shape": ("too_large", "too_long"),
}
REASON_OF = {fault: reason for reason, faults in REASONS.items() for fault in faults}
WORTH_RETRYING = {"rate_limited", "server_error", "timeout", "dead_host", "resolver", "reset", "tls"}


class Audited(NamedTuple):
    world: PlantedWorld
    status: int
    document: dict[str, Any]
    lists: Path


@pytest.fixture(scope="module")
def audited(two_downloads: PlantedWorld, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    output = tmp_path_factory.mktemp("audit")
    downloads = [f"--download={download.folder}" for download in (two_downloads.first, two_downloads.second)]
    status = main(
        ["--manifest", str(two_downloads.published), *downloads, "--output", str(output), "-j", "1", "--deep"]
    )
    return Audited(two_downloads, status, json.loads((output / "audit.json").read_bytes()), output / "lists")


def parts(audited: Audited) -> list[tuple[dict[str, Any], Download, Path]]:
    first, second = audited.document["downloads"]
    return [
        (first, audited.world.first, audited.lists),
        (second, audited.world.second, audited.lists / "second"),
    ]


def test_every_loss_has_its_uid_and_its_reason(audited: Audited) -> None:
    assert audited.status == 1
    for part, download, lists in parts(audited):
        rows = pq.read_table(lists / "missing.parquet").to_pylist()
        expected = {uid: REASON_OF[fault] for uid, fault in download.fates.fault.items()}
        assert {row["uid"]: row["reason"] for row in rows} == expected
        assert sum(reason["count"] for reason in part["reasons"].values()) == len(expected)
        counts = part["counts"]
        assert counts["listed"] == counts["attempted"] == len(audited.world.samples)
        assert counts["downloaded"] == counts["in_tars"] == len(audited.world.samples) - len(expected)
        assert [counts[name] for name in ("orphaned", "duplicated", "corrupt", "lost", "never_attempted")] == [0] * 5
        assert part["damaged_shards"] == []


def test_the_outage_is_told_from_the_rot_of_links(audited: Audited) -> None:
    first, second = audited.document["downloads"]
    assert first["outages"] == []
    (outage,) = second["outages"]
    assert (outage["shard"], outage["attempted"], outage["main_reason"]) == ("00003", SHARD_SIZE, "resolver")
    codes = [(finding["subject"], finding["code"]) for finding in audited.document["findings"]]
    assert ("second", "resolver") in codes
    assert ("first", "resolver") not in codes


def test_what_is_worth_it_is_listed_to_be_downloaded_again(audited: Audited) -> None:
    urls = {sample.uid: (sample.url, sample.text) for sample in audited.world.samples}
    for _, download, lists in parts(audited):
        rows = pq.read_table(lists / "retry.parquet").to_pylist()
        worth = {uid for uid, fault in download.fates.fault.items() if REASON_OF[fault] in WORTH_RETRYING}
        assert {row["uid"] for row in rows} == worth
        assert all((row["url"], row["text"]) == urls[row["uid"]] for row in rows)


def test_the_common_subset_is_what_arrived_twice(audited: Audited) -> None:
    first, second = audited.world.first.fates, audited.world.second.fates
    both = {sample.uid for sample in audited.world.samples if first.arrives(sample.uid) and second.arrives(sample.uid)}
    assert set(pq.read_table(audited.lists / "common.parquet")["uid"].to_pylist()) == both
    assert audited.document["pairs"][0]["common"] == len(both)


def test_changed_content_is_named_by_uid_with_how_much_it_shows(audited: Audited) -> None:
    for (part, download, lists), other in zip(parts(audited), (audited.world.second, audited.world.first)):
        content, expected = part["content"], {}
        for sample in audited.world.samples:
            kind = download.fates.content_of(sample.uid)
            if kind not in ("", "same"):
                published = other.fates.content_of(sample.uid) == "same"
                looks = {"rewrapped": "identical", "placeholder": "different"}.get(kind, kind)
                expected[sample.uid] = looks if published else "unseen"
        rows = pq.read_table(lists / "changed.parquet").to_pylist()
        assert {row["uid"]: row["tier"] for row in rows} == expected
        assert content["changed"] == len(expected)
        assert content["checked"] == part["counts"]["downloaded"]
        assert content["unknown"] == 0


def test_placeholders_and_hosts_that_changed_all(audited: Audited) -> None:
    first, second = audited.document["downloads"]
    planted = {uid for uid, kind in audited.world.first.fates.content.items() if kind == "placeholder"}
    assert set(pq.read_table(audited.lists / "placeholder.parquet")["uid"].to_pylist()) == planted
    assert pq.read_metadata(audited.lists / "second/placeholder.parquet").num_rows == 0
    hosts = [[host["host"] for host in part["content"]["mass_changes"]["listed"]] for part in (first, second)]
    assert hosts == [[STOCK], [HIJACKED]]
