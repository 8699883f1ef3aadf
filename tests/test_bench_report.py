"""Reports lose nothing of a result but its single measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.fixture
def bench_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_report

    return bench_report


def test_rows_within_parts_failures_and_the_gpu_are_told(bench_report: Any) -> None:
    result = {
        "machine": {"cpu": "16 cores"},
        "commit": "abc",
        "gpu": {"name": "NVIDIA H200", "rows": [{"contender": "torch", "npn_ms": 2.5}], "kernels": []},
        "queue": {"tflop": 0.5, "mapping": [{"contender": "triton", "ms": 1.5}], "mapping_runs": {"x": [{"ms": 9}]}},
        "filters": {"no_filter": {"seconds": 3.0}},
        "runs": {"x": [{"ms": 9}]},
        "failures": {"open_clip": "out of memory: all of it"},
    }
    assert bench_report.markdown(result).splitlines() == [
        "commit abc; NVIDIA H200, 16 cores",
        "",
        "**gpu**",
        "",
        "| contender | npn ms |",
        "|---|---|",
        "| torch | 2.5 |",
        "",
        "**queue mapping**",
        "",
        "| contender | ms |",
        "|---|---|",
        "| triton | 1.5 |",
        "",
        "**filters**",
        "",
        "| name | seconds |",
        "|---|---|",
        "| no_filter | 3 |",
        "",
        "- gpu name: NVIDIA H200",
        "- queue tflop: 0.5",
        "",
        "- open_clip failed: out of memory: all of it",
    ]


def test_published_results_can_be_reported(bench_report: Any) -> None:
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        told = bench_report.markdown(result)
        assert result.get("commit", "") in told.splitlines()[0], path.name
        contenders = [row.get("contender", "") for row in result.get("rows") or () if isinstance(row, dict)]
        assert [name for name in contenders if name not in told] == [], path.name


@pytest.mark.parametrize(
    ("name", "axes"), [("kernels_h200", 1), ("layers_bench_h200", 1), ("npn_queue_mapped_h200", 3), ("step_cpu", 2)]
)
def test_shares_of_the_bound_are_drawn_where_there_are_no_ratios(
    bench_report: Any, name: str, axes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(bench_report, "_save", lambda figure, path: drawn.append(figure))
    bench_report.draw(json.loads((RESULTS / f"{name}.json").read_text()), str(tmp_path / "plot.png"))
    (figure,) = drawn
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert len(labels) == axes
    assert all(label.endswith("(1 is the peer)" if name == "step_cpu" else "(1 is the bound)") for label in labels)


def test_files_that_hold_no_result_are_named(bench_report: Any, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("no json")
    for name, why in (("list", "no result but a list"), ("text", "cannot be read"), ("missing", "cannot be read")):
        with pytest.raises(SystemExit, match=rf"{name}\.json: .*{why}.* Give what a section wrote"):
            bench_report.report(bench_report.Report(result=str(tmp_path / f"{name}.json")))
