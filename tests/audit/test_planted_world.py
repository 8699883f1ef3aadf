"""That the planted faults are those that real img2dataset met; what other tests of the audit build on."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter

import pyarrow.parquet as pq
import pytest
from planted_errors import ERRORS
from planted_list import SHARD_SIZE
from planted_world import Download, PlantedWorld


def rows_of(download: Download) -> dict[str, dict[str, object]]:
    tables = [pq.read_table(path).to_pylist() for path in sorted(download.folder.glob("*.parquet"))]
    rows = {row["uid"]: row for table in tables for row in table}
    assert len(rows) == sum(map(len, tables))
    return rows


@pytest.fixture(params=["first", "second"])
def download(request: pytest.FixtureRequest, two_downloads: PlantedWorld) -> Download:
    return getattr(two_downloads, request.param)


def test_every_fault_is_met_by_its_uid_and_no_other(two_downloads: PlantedWorld, download: Download) -> None:
    rows = rows_of(download)
    assert set(rows) == {sample.uid for sample in two_downloads.samples}
    for uid, row in rows.items():
        fault = download.fates.fault.get(uid)
        status, text = ERRORS[fault] if fault else ("success", "None")
        assert row["status"] == status, (fault, row)
        assert re.fullmatch(text, str(row["error_message"]), re.DOTALL), (fault, row)


def test_hashes_are_of_the_bytes_that_were_served(two_downloads: PlantedWorld, download: Download) -> None:
    rows = rows_of(download)
    for sample in two_downloads.samples:
        content, row = download.fates.content_of(sample.uid), rows[sample.uid]
        assert (row["sha256"] is None) == (content == "")
        assert (row["sha256"] == hashlib.sha256(sample.image).hexdigest()) == (content == "same")
        if content in ("same", "rewrapped", "recompressed"):
            assert (row["original_width"], row["original_height"]) == sample.size


def test_tars_hold_the_successes(download: Download) -> None:
    found = {}
    for path in sorted(download.folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            jsons = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
        found.update({meta["uid"]: path.stem for meta in jsons})
    wanted = {uid: row["key"][:5] for uid, row in rows_of(download).items() if row["status"] == "success"}
    assert found == wanted


def test_the_second_download_lost_one_whole_shard_to_its_resolver(two_downloads: PlantedWorld) -> None:
    stats = two_downloads.second.folder / f"{two_downloads.outage_shard:05d}_stats.json"
    counts = Counter(json.loads(stats.read_text())["status_dict"])
    lost = counts["<urlopen error [Errno -3] Temporary failure in name resolution>"]
    assert lost > SHARD_SIZE - 5
    assert not counts["success"]
    in_first = json.loads((two_downloads.first.folder / stats.name).read_text())["status_dict"]
    assert in_first["success"] > SHARD_SIZE / 2


def test_every_known_error_text_is_planted_somewhere(two_downloads: PlantedWorld) -> None:
    planted = {*two_downloads.first.fates.fault.values(), *two_downloads.second.fates.fault.values()}
    assert planted == set(ERRORS)
