"""The whole of a reproduction: real downloads, audits and trainings, killed on the way; true to what was planted."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from reproduce_helpers import NUM_PAIRS, RUNS, STAGES, arguments, make_demo_data, report, start

from neuclip_scale.data.manifest import Manifest
from neuclip_scale.reproduce.demo_list import Served
from neuclip_scale.run_folder import read_object

REASONS = {"not found": "not_found", "gone": "not_found", "broken": "server_error", "page": "not_decoded"}


def processes_of(output: Path) -> list[str]:
    """Command lines that name the folder."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(output) in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reproduction that was killed while it downloaded, ended while it trained, and then finished."""
    folder = tmp_path_factory.mktemp("reproduce")
    demo_data, output = make_demo_data(folder / "demo"), folder / "out"
    moments = {"download: begins": os.killpg, f"train/{RUNS[1]}: begins": os.kill}
    for moment, end in moments.items():
        running = start(*arguments(demo_data, output), start_new_session=True)
        assert running.stdout is not None
        for line in running.stdout:
            if moment in line:
                break
        time.sleep(2)
        end(running.pid, signal.SIGKILL if end is os.killpg else signal.SIGTERM)
        running.wait(120)
        deadline = time.monotonic() + 30
        while left := processes_of(output):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    done = start(*arguments(demo_data, output))
    said = done.communicate(timeout=400)[0]
    assert done.returncode == 0, said
    assert [name for name in STAGES if f"{name}: kept from before" in said] == list(STAGES)
    return output


@pytest.mark.slow
def test_what_the_web_lost_is_counted_by_its_reason(finished: Path) -> None:
    faults = Served.read(finished / "list").faults
    assert len(faults) > 5
    assert pq.read_table(finished / "list/list.parquet").num_rows == NUM_PAIRS
    found = report(finished)["stages"]
    lost = {name: kind for name, kind in faults.items() if kind != "changed"}
    assert found["download"]["downloaded"] == NUM_PAIRS - len(lost)
    assert found["audit"]["missing"] == len(lost)
    assert found["index"]["changed"] == len(faults) - len(lost)
    audit = read_object(finished / "audit/audit.json")["downloads"][0]
    for reason in set(REASONS.values()):
        planted = sum(REASONS.get(kind) == reason for kind in lost.values())
        assert audit["reasons"].get(reason, {"count": 0})["count"] == planted, reason


@pytest.mark.slow
def test_every_run_saw_the_audited_shards_and_nothing_else(finished: Path) -> None:
    kept = report(finished)["stages"]
    manifest = Manifest.load(finished / "manifest.parquet")
    assert manifest.num_samples == kept["index"]["usable"]
    digests = []
    for label in RUNS:
        summary = read_object(finished / f"runs/{label}/summary.json")
        assert summary["audit"]["digest"] == kept["index"]["digest"]
        assert summary["dataset_size"] == manifest.num_samples
        lines = (finished / f"runs/{label}/metrics.jsonl").read_text().splitlines()
        digests.append([json.loads(line)["batch_digest"] for line in lines])
    assert len(digests[0]) == 3
    assert digests[0] == digests[1], "methods of one seed see the same pairs in the same order"


@pytest.mark.slow
def test_the_report_says_what_was_measured(finished: Path) -> None:
    found = report(finished)
    evaluation = read_object(finished / "evaluations/neuclip-seed0.json")["evaluation"]["retrieval"]
    value = 100 * evaluation["image_to_text"]["recall@5"]
    assert found["methods"]["neuclip"]["retrieval image→text R@5"]["mean"] == pytest.approx(value)
    page, text = (finished / "report/index.html").read_text(), (finished / "report/report.md").read_text()
    assert page.count("not run") == text.count("not run") == 25, "the paper's table, of which nothing was run"
    for name in (*STAGES, *(f"train/{label}" for label in RUNS)):
        assert found["stages"][name]["seconds"] >= 0
        assert f"| {name} |" in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (finished / "report" / picture).stat().st_size > 1000


@pytest.mark.slow
def test_trainings_that_fail_leave_a_report_of_the_others(finished: Path, tmp_path: Path) -> None:
    given = arguments(finished.parent / "demo", finished, "--launcher", "false", "--json", tmp_path / "copy.json")
    given[given.index("--seeds") + 2 : given.index("--seeds") + 2] = ["1"]
    failed = start(*given)
    said = failed.communicate(timeout=200)[0]
    assert failed.returncode == 1, said
    assert "train/neuclip-seed1: exit status 1" in said.splitlines()[-1]
    copy = read_object(tmp_path / "copy.json")
    assert copy == report(finished)
    assert copy["methods"]["neuclip"]["retrieval image→text R@5"]["mean"] > 0, "of seed 0"
    assert str(finished / "report/index.html") in said


def test_a_copy_of_a_report_that_is_not_made_is_refused(tmp_path: Path) -> None:
    refused = start(*arguments(tmp_path, tmp_path / "out", "--until", "audit", "--json", tmp_path / "copy.json"))
    assert "--json" in refused.communicate(timeout=100)[0]
    assert refused.returncode == 2
    assert not (tmp_path / "out").exists()
