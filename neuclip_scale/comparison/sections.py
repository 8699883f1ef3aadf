"""A comparison as sections of sentences and tables, the same for the console and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neuclip_scale.comparison.comparing import Comparison
from neuclip_scale.comparison.cost import ENERGY, RunCosts, cost_text
from neuclip_scale.comparison.differences import NOT_RECORDED, Difference
from neuclip_scale.comparison.metrics import MetricRow, PairedDifference
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.evaluation.statistics import Estimate, sign_flip_name
from neuclip_scale.untrusted_text import listed, number, printable, show


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first column is a heading."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """Sentences, then tables."""

    title: str
    lines: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)


def sections(comparison: Comparison) -> list[Section]:
    """All sections in the order a reader needs them; figures are the page's own."""
    return [
        _runs(comparison),
        _recipes(comparison),
        _code(comparison),
        _data(comparison),
        _metrics(comparison),
        _cost(comparison),
    ]


def summary_lines(comparison: Comparison) -> tuple[str, list[str]]:
    """(the sentence about the recipes, what else stands against comparing the runs)."""
    others = [finding.text for finding in comparison.findings if finding.kind != "recipe"]
    return comparison.drift.verdict, others


def conclusion(comparison: Comparison) -> str:
    """What follows where nothing stands against comparing the runs; empty where something does."""
    if not comparison.comparable:
        return ""
    if comparison.is_sure:
        return "Nothing stands against comparing these runs: their code and their data are the same."
    same, unknown = [], []
    if comparison.code_notes:
        unknown.append("Whether their code is the same is not known: see Code and machine.")
    else:
        same.append("their code is the same")
    if comparison.data.contents_known:
        same.append("their data are the same")
    else:
        unknown.append("Not every run recorded what it read under the same uids: see Data seen.")
    told = "Nothing that is recorded stands against comparing these runs"
    return " ".join([f"{', and '.join([told, *same])}.", *unknown])


def _runs(comparison: Comparison) -> Section:
    rows = []
    for arm in comparison.arms:
        for run in arm.runs:
            rows.append([run.label, arm.name, _told(run.seed), _status(run), show(printable(str(run.path)))])
    return Section("Runs", [], [Grid("", ["run", "arm", "seed", "status", "folder"], rows)])


def _status(run: RunFolder) -> str:
    if run.summary is None:
        return "unknown"
    status = show(run.summary.get("status", "unknown"))
    at = f"{_told(run.summary.get('step'))}/{_told(run.summary.get('num_steps'))}"
    return f"{status}, step {at}"


def _recipes(comparison: Comparison) -> Section:
    drift = comparison.drift
    grids = [
        _difference_grid(title, found)
        for title, found in (
            ("More than the method", drift.other),
            ("The method (objective.*, optim.temperature_*)", drift.method),
            ("The seed", drift.seed),
            ("By design", drift.by_design),
            ("Nothing that is computed", drift.neutral),
        )
        if found
    ]
    return Section("Recipes", [drift.verdict, *drift.notes], grids)


def _code(comparison: Comparison) -> Section:
    known = sum(run.environment is not None for run in comparison.runs)
    if known < 2:
        return Section("Code and machine", ["Fewer than two runs tell their code and machine."])
    same = "no difference is recorded" if comparison.code_notes else "the same commit and packages"
    lines = [*([] if comparison.code else [f"Code: {same}."]), *comparison.code_notes]
    lines += [] if comparison.machines else ["Machine: the same."]
    titled = (("Code", comparison.code), ("Machine", comparison.machines))
    return Section("Code and machine", lines, [_difference_grid(title, found) for title, found in titled if found])


def _difference_grid(title: str, found: Sequence[Difference]) -> Grid:
    labels = list(found[0].values)
    return Grid(title, ["", *labels], [[each.name, *(show(each.values[label]) for label in labels)] for each in found])


def _data(comparison: Comparison) -> Section:
    data = comparison.data
    rows = [
        [
            row.label,
            row.fingerprint or NOT_RECORDED,
            _count(row.num_samples),
            _count(row.num_shards),
            _count(row.samples_seen),
            _count(row.samples_skipped),
            _count(row.listed_skips),
            _count(row.last_step),
        ]
        for row in data.runs
    ]
    columns = ["run", "fingerprint", "pairs", "shards", "pairs seen", "skipped", "lines in skipped/", "last step"]
    shown = [text for text in data.discrepancies if text not in {order.text for order in data.orders}]
    lines = [*shown, *(order.text for order in data.orders), *data.notes]
    prints = {row.fingerprint for row in data.runs}
    if len(prints) == 1 and None not in prints:
        lines.insert(0, "The same training data: equal fingerprints.")
    return Section("Data seen", lines, [Grid("", columns, rows)])


def _metrics(comparison: Comparison) -> Section:
    metrics = comparison.metrics
    arms = [arm.name for arm in comparison.arms]
    columns = ["set", "measure", *arms, "chance", "majority"]
    grids = [Grid("Mean over seeds [95 % t interval] (n)", columns, [_metric_row(row, arms) for row in metrics.rows])]
    for first, second in dict.fromkeys((pair.first, pair.second) for pair in metrics.pairs):
        mine = [pair for pair in metrics.pairs if (pair.first, pair.second) == (first, second)]
        columns = ["set", "measure", "difference [95 % t interval]", "n", "p", "p, Holm", "least p"]
        title = f"{second} minus {first}, paired by seed"
        grids.append(Grid(title, columns, [_pair_row(pair) for pair in mine]))
    lines = [*metrics.discrepancies, *metrics.notes]
    if metrics.pairs:
        test = sign_flip_name([len(pair.seeds) for pair in metrics.pairs])
        lines.append(f"p: {test} of the paired differences, corrected over the metrics of a pair of arms.")
    if not metrics.rows:
        return Section("Metrics", [*lines, "No run has scores."])
    return Section("Metrics", lines, grids)


def _metric_row(row: MetricRow, arms: Sequence[str]) -> list[str]:
    values = [_estimate(row.arms[name], with_n=True) if name in row.arms else "-" for name in arms]
    guesses = ["" if value is None else f"{100 * value:.2f} %" for value in (row.chance, row.majority)]
    return [row.metric.set_name, row.metric.label, *values, *guesses]


def _pair_row(pair: PairedDifference) -> list[str]:
    p_values = [f"{value:.3g}" for value in (pair.p, pair.p_holm, pair.smallest_p)]
    difference = _estimate(pair.estimate, signed=True)
    return [pair.metric.set_name, pair.metric.label, difference, str(len(pair.seeds)), *p_values]


def _estimate(estimate: Estimate, *, with_n: bool = False, signed: bool = False) -> str:
    """In per cent, a signed difference in percentage points; limits of an interval may lie outside 0 to 100."""
    sign = "+" if signed else ""
    text = f"{100 * estimate.mean:{sign}.2f} {'points' if signed else '%'}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{100 * estimate.low:{sign}.2f}, {100 * estimate.high:{sign}.2f}]"
    return f"{text} ({estimate.n})" if with_n else text


def _cost(comparison: Comparison) -> Section:
    costs = comparison.costs
    lines = ["Measuring and evaluating are not counted; peak memory is that of the whole process, these included."]
    sources = dict.fromkeys(each.source for each in costs.values() if each.source)
    for source in sources:
        labels = [label for label, each in costs.items() if each.source == source]
        lines.append(f"Energy of {'all runs' if len(labels) == len(costs) else listed(labels)}: {source}.")
    for label, each in costs.items():
        if since := number(each.other.get("since_step")):
            lines.append(f"{label}: older code began the run; all but its seconds is counted from step {since:g} on.")
    if comparison.drift.neutral:
        names = listed([each.name for each in comparison.drift.neutral])
        lines.append(f"Recipes differ in {names}: that can change times and memory.")
    if comparison.machines:
        lines.append("Machines differ: times, memory and energy say as much about them as about the method.")
    grids = [
        _by_run("", {label: _main_costs(each) for label, each in costs.items()}),
        _by_run("Share of a step's time, on rank 0", {label: _shares(each.shares) for label, each in costs.items()}),
        _by_run("Also recorded", {label: _cost_texts(each.other) for label, each in costs.items()}),
    ]
    return Section("Cost of training", lines, [grid for grid in grids if any(grid.rows) and len(grid.columns) > 1])


def _by_run(title: str, cells: Mapping[str, Mapping[str, str]]) -> Grid:
    """`cells` (run -> name -> text) with a column for each run or for each name, whichever are fewer."""
    names = list(dict.fromkeys(name for of_run in cells.values() for name in of_run))
    columns = ["run", *names]
    rows = [[run, *(of_run.get(name, "-") for name in names)] for run, of_run in cells.items()]
    if len(cells) <= len(names):
        columns, *rows = ([*line] for line in zip(columns, *rows, strict=True))
        columns[0] = ""
    return Grid(title, columns, rows)


def _main_costs(costs: RunCosts) -> dict[str, str]:
    marks = "".join(f" ({word})" for word in ("estimate", "incomplete") if word in costs.source)
    return {name: text + (marks if name == ENERGY else "") for name, text in _cost_texts(costs.main).items()}


def _cost_texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: cost_text(value) for name, value in values.items()}


def _shares(shares: Mapping[str, float]) -> dict[str, str]:
    """By the first part of the sections' names, as each estimator has sections of its own."""
    sums: dict[str, float] = {}
    for name, share in shares.items():
        group = name.partition("/")[0]
        sums[group] = sums.get(group, 0.0) + share
    return {group: f"{share:.1%}" for group, share in sums.items()}


def _count(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:,.0f}"


def _told(value: object) -> str:
    return NOT_RECORDED if value is None else show(value)
