"""The whole of a reproduction: real downloads, audits and trainings, killed on the way; true to what was planted."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from reproduce_helpers import NUM_PAIRS, RUNS, STAGES, arguments, make_demo_data, report, start

from neuclip_scale.comparison.steps import read_steps
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.reproduce.demo_list import Served
from neuclip_scale.run_folder import read_object

REASONS = {"not found": "not_found", "gone": "not_found", "broken": "server_error", "page": "not_decoded"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reproduction that was killed twice, once while it downloaded and once while it trained, and then finished."""
    folder = tmp_path_factory.mktemp("reproduce")
    demo_data, output = make_demo_data(folder / "demo"), folder / "out"
    for moment in ("download: begins", f"train/{RUNS[1]}: begins"):
        running = start(*arguments(demo_data, output), start_new_session=True)
        assert running.stdout is not None
        for line in running.stdout:
            if moment in line:
                break
        time.sleep(2)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
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
    for label in RUNS:
        summary = read_object(finished / f"runs/{label}/summary.json")
        assert summary["audit"]["digest"] == kept["index"]["digest"]
        assert summary["dataset_size"] == manifest.num_samples
        assert read_steps(finished / f"runs/{label}/metrics.jsonl")[0].last_step == 3
    for seed in (0, 1):  # methods of one seed saw the same pairs in the same order
        digests = [
            [json.loads(line)["batch_digest"] for line in (finished / f"runs/{name}-seed{seed}/metrics.jsonl").open()]
            for name in ("openclip", "neuclip")
        ]
        assert digests[0] == digests[1]


@pytest.mark.slow
def test_the_report_says_what_was_measured(finished: Path) -> None:
    found = report(finished)
    score = "retrieval image→text R@1"
    values = []
    for seed in (0, 1):
        evaluation = read_object(finished / f"evaluations/neuclip-seed{seed}.json")["evaluation"]["retrieval"]
        values.append(100 * evaluation["image_to_text"]["recall@1"])
    assert found["methods"]["neuclip"][score]["mean"] == pytest.approx(sum(values) / 2)
    page, text = (finished / "report/index.html").read_text(), (finished / "report/report.md").read_text()
    assert page.count("not run") == text.count("not run") == 25, "the paper's table, of which nothing was run"
    for name in (*STAGES, *(f"train/{label}" for label in RUNS)):
        assert found["stages"][name]["seconds"] >= 0
        assert f"| {name} |" in text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (finished / "report" / picture).stat().st_size > 1000
