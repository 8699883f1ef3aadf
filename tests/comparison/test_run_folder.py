"""Run folders with anything in them: reading and comparing never raises."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from comparison_helpers import write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from neuclip_scale.comparison import compare_runs, read_run, read_runs
from neuclip_scale.comparison.page import render_page
from neuclip_scale.comparison.steps import read_steps
from neuclip_scale.files import write_json

FILES = ("config.yaml", "environment.json", "manifest.json", "metrics.jsonl", "evaluations.jsonl", "summary.json")
KEYS = (
    *("step", "num_steps", "loss", "evaluation", "task", "zeroshot", "retrieval", "top1", "num_pictures", "num_texts"),
    *("git", "packages", "format", "shards", "path", "num_samples", "first_index", "cost", "seed", "objective", "gpus"),
    *("image_to_text", "recall@1", "samples_seen", "batch_digest", "train_seconds", "step_time", "eval/x"),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("zeroshot")
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner),
    max_leaves=12,
)


def compare_with(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [write_run(Path(folder) / label) for label in "ab"]
        (runs[1] / name).write_bytes(content)
        comparison = compare_runs(read_runs(runs))
        write_json(Path(folder) / "compare.json", comparison.document())
        assert "Cost of training" in render_page(comparison, {})


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(FILES), st.binary(max_size=200))
def test_any_bytes(name: str, content: bytes) -> None:
    compare_with(name, content)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FILES), st.lists(values, min_size=1, max_size=3))
def test_any_json(name: str, documents: list[Any]) -> None:
    compare_with(name, b"\n".join(json.dumps(document).encode() for document in documents))


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), values), st.dictionaries(st.sampled_from(KEYS), values))
def test_any_fields_of_scores(zero_shot: dict[str, Any], retrieval: dict[str, Any]) -> None:
    sets = {"zeroshot": zero_shot | {"task": "zeroshot"}, "retrieval": retrieval | {"task": "retrieval"}}
    compare_with("summary.json", json.dumps({"evaluation": sets, "status": "finished"}).encode())


def test_steps_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 2.0, "samples_seen": 8, "batch_digest": "a", "step_time": 0.5}',
        '{"step": 2, "loss": "NaN", "batch_digest": 7, "eval/zeroshot/top1": 0.25}',
        '{"step": true, "loss": 1.0}',
        '{"step": 2, "loss": 1.5, "samples_seen": 16}',
        '{"step": 5, "eval/zeroshot/top1": 0.5}',
        '{"step": 4, "loss": 1.25}',
        '{"step": 5, "lo',
    ]
    path.write_text("\n".join(lines), "utf-8")
    steps, problems = read_steps(path)
    assert {place: step.loss for place, step in steps.by_number.items()} == {1: 2.0, 2: 1.5, 4: 1.25}
    assert steps.by_number[1].digest == "a"
    assert steps.evaluations == {"zeroshot/top1": {2: 0.25, 5: 0.5}}
    texts = ("line 3 and 1 more: not a step in JSON", "1 of the steps up to 4 have no line", "stand there twice")
    for text, problem in zip(texts, problems, strict=True):
        assert text in problem


def test_scores_during_training_are_read_from_their_record(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    sets = {"zeroshot": {"task": "zeroshot", "top1": 0.25, "unreadable": []}, "r": {"image_to_text": {"recall@1": 0.5}}}
    lines = [
        json.dumps({"step": 2, "samples_seen": 16, "evaluation": sets}),
        json.dumps({"step": 4, "evaluation": {"zeroshot": {"top1": 0.75, "top5": math.nan, "whole": True}}}),
        json.dumps({"step": 4, "evaluation": 3}),
        '{"step": 4, "eva',
    ]
    (path / "evaluations.jsonl").write_text("\n".join(lines), "utf-8")
    run = read_run(path, "a")
    (problem,) = run.problems
    assert "evaluations.jsonl, line 3 and 1 more: not the scores of a step in JSON" in problem
    (curves,) = compare_runs([run]).curves
    assert {name: (curve.samples, curve.values) for name, curve in curves.evaluations.items()} == {
        "zeroshot/top1": ([16, 32], [0.25, 0.75]),
        "r/image_to_text/recall@1": ([16], [0.5]),
    }


def test_a_record_of_scores_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    (path / "evaluations.jsonl").mkdir()
    (problem,) = read_run(path, "a").problems
    assert "evaluations.jsonl: cannot be read (" in problem


def test_a_summary_of_an_earlier_stop(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", steps=4, summary={"status": "stopped", "step": 2}), "a")
    assert len(run.problems) == 1
    assert "step = 2, but metrics.jsonl ends at step 4" in run.problems[0]


def test_no_label_hides_another(tmp_path: Path) -> None:
    names = ["run", "x/run", "x/run (2)", "\x1b", "\\x1b"]
    labels = [run.label for run in read_runs([write_run(tmp_path / name) for name in names])]
    assert len(set(labels)) == len(names)


def test_a_loss_that_is_not_finite_is_no_point(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": 5, "loss": math.nan, "samples_seen": 40}) + "\n")
    (curve,) = compare_runs([read_run(path, "a")]).curves
    assert len(curve.loss.values) == 4
