"""The report's numbers against scipy, and what it says of what was not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from neuclip_scale.reproduce.experiment import Published, changed, load_experiment, published_of
from neuclip_scale.reproduce.figures import draw_figures
from neuclip_scale.reproduce.report_sections import (
    all_published_section,
    cost_section,
    data_section,
    differences_section,
    published_section,
    settings_section,
)
from neuclip_scale.reproduce.reporting import markdown
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.results import AVERAGE, Results, RunResult
from neuclip_scale.studies.page import Page, Section

SCORES = {"openclip": (21.0, 22.0, 22.3), "neuclip": (25.1, 24.9, 25.6)}


def results(output: Path, *, missing: tuple[str, ...] = (), overrides: tuple[str, ...] = (), **changes: Any) -> Results:
    experiment = changed(load_experiment("cc3m"), methods=("openclip", "siglip", "neuclip"), **changes)
    (output / "x.tsv").touch()
    request = Request(experiment=experiment, output=output, list=str(output / "x.tsv"), overrides=overrides)
    runs = {}
    for label, (method, seed) in request.labels.items():
        scores = {AVERAGE: SCORES[method][seed]} if method in SCORES else {}
        cost = {"energy_joules": 7.2e6, "energy_source": "measured: NVML"}
        summary = {"train_seconds": 600.0, "device_hours": 2.0, "samples_per_second": 100.0, "epochs": 37.0}
        runs[label] = RunResult(method, seed, {**summary, "cost": cost} if scores else {}, scores, missing)
    index = {"usable": 2_500_000, "digest": "d1", "fingerprint": "f1", "checked": 0, "changed": 0}
    return Results(request, {"index": {"seconds": 1.0, "result": index}}, runs)


def row(section: Section, first: str) -> list[str]:
    return next(each for each in section.rows if each[0] == first)


def test_ours_stands_beside_the_published_with_students_interval(tmp_path: Path) -> None:
    section = published_section(results(tmp_path))
    values = np.array(SCORES["neuclip"])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    ours = f"{values.mean():.2f} [{low:.2f}, {high:.2f}] (3)"
    difference = f"{values.mean() - 25.08:+.2f} [{low - 25.08:+.2f}, {high - 25.08:+.2f}]"
    assert row(section, "neuclip") == ["neuclip", ours, "25.08", difference, "3", "3"]
    assert row(section, "siglip") == ["siglip", "not run", "22.19", "", "0", "3"]
    assert row(section, "amorlip")[1] == "not run", "published, and not even asked for"


def test_an_average_that_lacks_tasks_says_which(tmp_path: Path) -> None:
    section = published_section(results(tmp_path, missing=("vtab/cifar10",)))
    assert any("No average where tasks lack (1): vtab/cifar10" in text for text in section.paragraphs)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    section = differences_section(results(tmp_path))
    found = np.array(SCORES["neuclip"]) - np.array(SCORES["openclip"])
    low, high = stats.t.interval(0.95, 2, found.mean(), stats.sem(found))
    told = f"{found.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
    assert section.rows == [["neuclip - openclip", AVERAGE, told, "0.25", "0.25"]]
    assert any(text.startswith("siglip: fewer than two seeds") for text in section.paragraphs)


def test_the_least_p_is_of_the_seeds_that_a_pair_has_in_common(tmp_path: Path) -> None:
    found = results(tmp_path, seeds=(0, 1, 2))
    found.runs["neuclip-seed2"].scores.clear()
    told = differences_section(found).paragraphs[-1]
    assert "No p can be below 0.5 with 2 common seeds: read the intervals." in told
    assert "by the exact sign-flip test, " in told


def test_the_papers_table_shows_what_was_not_run(tmp_path: Path) -> None:
    section = all_published_section(results(tmp_path))
    assert section.header == ["method", "cc3m", "cc12m", "dfn14m", "dfn192m", "dfn1b"]
    cells = row(section, "neuclip")
    assert cells[1].startswith("25.08 (25.20 [")
    assert cells[2:] == [f"{value} (not run)" for value in ("31.89", "39.16", "54.90", "57.34")]


def test_settings_that_are_not_the_published_ones_are_listed(tmp_path: Path) -> None:
    same = settings_section(results(tmp_path))
    assert not same.rows
    assert "All 12 published settings are as published" in same.paragraphs[0]
    other = settings_section(results(tmp_path, overrides=("train.epochs=3", "objective.rho=9")))
    epochs = [[method, "train.epochs", "3.0", "37"] for method in ("openclip", "siglip", "neuclip")]
    assert sorted(other.rows) == sorted([*epochs, ["neuclip", "objective.rho", "9.0", "6.5"]])
    assert "Overridden here: train.epochs=3 objective.rho=9." in other.paragraphs


def test_data_and_cost_add_up(tmp_path: Path) -> None:
    data = data_section(results(tmp_path))
    assert row(data, "in the training shards") == ["in the training shards", "2,500,000", "2,723,840", "91.8%"]
    assert row(data, "tried")[1] == "not run"
    assert "Audit of the training shards, which every run required: digest d1, fingerprint f1." in data.paragraphs
    cost = cost_section(results(tmp_path), price=3.0)
    assert row(cost, "sum")[:4] == ["sum", "60.0", "12.000", "12.0000"]
    assert "At 3 a device-hour: 36.00." in cost.paragraphs
    assert row(cost, "siglip-seed0")[1:] == ["not run"] * 5


def test_the_price_contains_what_kills_cost(tmp_path: Path) -> None:
    found = results(tmp_path)
    next(run for run in found.runs.values() if run.summary).cost["lost_device_hours"] = 0.5
    cost = cost_section(found, price=3.0)
    assert row(cost, "sum")[2] == "12.000"
    assert "Beside these, 0.500 device-hours of steps were lost in kills and done again." in cost.paragraphs
    assert "At 3 a device-hour, lost ones included: 37.50." in cost.paragraphs


def test_a_filter_is_held_against_what_was_published_of_it(tmp_path: Path) -> None:
    def of(*filtered: str) -> Published:
        return published_of(changed(load_experiment("medium"), filter=filtered[0], filter_options=filtered[1:]))

    assert of("no_filter").scores == {"openclip": 25.8}
    best = of("clip_score", "--arch", "l14", "--fraction", "0.3")
    assert (best.scores, best.pairs) == ({"openclip": 32.8}, 38_000_000)
    assert of("basic_filter").scores == {}
    section = published_section(results(tmp_path, filter="basic_filter"))
    assert section.paragraphs[0].startswith("Nothing is published for this experiment with this filter")
    assert row(all_published_section(results(tmp_path, filter="basic_filter")), "neuclip")[1] == "25.08 (not run)"
    told = settings_section(results(tmp_path, filter="basic_filter")).paragraphs
    assert "The filter is not the experiment's, no_filter" in told


def test_figures_show_nothing_published_of_another_filter(tmp_path: Path) -> None:
    def drawn(folder: Path, **changes: Any) -> bytes:
        return draw_figures(results(tmp_path, filter="basic_filter", **changes), folder)[0].read_bytes()

    assert drawn(tmp_path / "a") == drawn(tmp_path / "b", published=Published())


def test_nothing_in_a_report_is_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|`x`"
    section = Section(evil, [evil], ["a"], [[evil]])
    Page(evil, [section]).write(tmp_path / "page.html")
    assert "<script>" not in (tmp_path / "page.html").read_text()
    text = markdown(evil, [section], tmp_path)
    assert "<script" not in text.replace("\\<", "")
    assert text.splitlines()[-1] == "| \\<script\\>alert(1)\\</script\\>\\|\\`x\\` |"


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    section = published_section(results(tmp_path, seeds=(0,)))
    assert row(section, "neuclip")[1] == "25.10 (1)"
    assert row(section, "neuclip")[3] == pytest.approx("+0.02") or row(section, "neuclip")[3] == "+0.02"
