"""All parts of a comparison together, and what they say about whether the runs can be compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from neuclip_scale.comparison.arms import Arm, group_arms
from neuclip_scale.comparison.cost import RunCosts, costs
from neuclip_scale.comparison.curves import RunCurves, run_curves
from neuclip_scale.comparison.data_seen import DataSeen, data_seen
from neuclip_scale.comparison.differences import Difference
from neuclip_scale.comparison.drift import Drift, recipe_drift
from neuclip_scale.comparison.history import mixed_runs
from neuclip_scale.comparison.metrics import MetricComparison, compare_metrics
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.comparison.versions import code_differences, code_notes, machine_differences
from neuclip_scale.untrusted_text import listed, plain

FORMAT = 2
"""Version of the layout of compare.json."""


@dataclass(frozen=True)
class Finding:
    """Something that stands against comparing the runs, or a run that is not whole."""

    kind: Literal["recipe", "code", "data", "evaluation", "run"]
    text: str


@dataclass(frozen=True)
class Comparison:
    """What is known about the runs, part by part."""

    runs: list[RunFolder]
    arms: list[Arm]
    drift: Drift
    code: list[Difference]
    code_notes: list[str]
    machines: list[Difference]
    history: list[str]
    """Runs of which an earlier part had another recipe or other code."""
    data: DataSeen
    metrics: MetricComparison
    curves: list[RunCurves]
    costs: dict[str, RunCosts]

    @property
    def findings(self) -> list[Finding]:
        """Everything against the comparison, the recipes first; empty when the runs are comparable."""
        found = [Finding("recipe", self.drift.verdict)] if self.drift.other else []
        if self.code:
            found.append(Finding("code", f"Code differs: {listed([each.name for each in self.code])}."))
        found += [Finding("run", text) for text in self.history]
        found += [Finding("data", text) for text in self.data.discrepancies]
        found += [Finding("evaluation", text) for text in self.metrics.discrepancies]
        found += [Finding("run", text) for run in self.runs for text in run.problems]
        return found

    @property
    def comparable(self) -> bool:
        """Whether nothing stands against comparing the runs."""
        return not self.findings

    @property
    def is_sure(self) -> bool:
        """Whether all that comparing asks for was recorded, and nothing stands against it."""
        return self.comparable and not self.code_notes and self.data.contents_known

    def document(self) -> dict[str, Any]:
        """Everything as plain values for compare.json."""
        return {
            "format": FORMAT,
            "comparable": self.comparable,
            "verdict": self.drift.verdict,
            "findings": [asdict(each) for each in self.findings],
            "runs": [_run_document(run) for run in self.runs],
            "arms": [{"name": arm.name, "runs": [run.label for run in arm.runs]} for arm in self.arms],
            "drift": asdict(self.drift),
            "code": {"differences": [asdict(each) for each in self.code], "notes": self.code_notes},
            "environment": [asdict(each) for each in self.machines],
            "history": self.history,
            "data": asdict(self.data),
            "metrics": _metrics_document(self.metrics),
            "curves": [asdict(each) for each in self.curves],
            "cost": {label: each.document() for label, each in self.costs.items()},
        }


def compare_runs(runs: Sequence[RunFolder], by_design: Collection[str] = ()) -> Comparison:
    """Compare runs as far as their folders could be read.

    `by_design`: dotted fields in which the recipes are meant to differ (`train.num_steps` at equal wall-clock). They
    are listed, tell arms apart as others do, and are no finding; nor are numbers of samples that differ with them. A
    name that no recipe has changes nothing.
    """
    arms, drift = group_arms(runs), recipe_drift(runs, by_design)
    return Comparison(
        runs=list(runs),
        arms=arms,
        drift=drift,
        code=code_differences(runs),
        code_notes=code_notes(runs),
        machines=machine_differences(runs),
        history=mixed_runs(runs),
        data=data_seen(runs, [each.name for each in drift.by_design]),
        metrics=compare_metrics(arms),
        curves=run_curves(runs),
        costs=costs(runs),
    )


def _run_document(run: RunFolder) -> dict[str, Any]:
    return {
        "label": run.label,
        "path": plain(str(run.path)),
        "problems": run.problems,
        "recipe": None if run.recipe is None else run.recipe.fields,
        "environment": run.environment,
        "summary": run.summary,
    }


def _metrics_document(metrics: MetricComparison) -> dict[str, Any]:
    """As `asdict`, with named tuples as objects too."""
    rows = [
        {
            **asdict(row),
            "metric": row.metric._asdict(),
            "arms": {name: estimate._asdict() for name, estimate in row.arms.items()},
        }
        for row in metrics.rows
    ]
    pairs = [
        {**asdict(pair), "metric": pair.metric._asdict(), "estimate": pair.estimate._asdict()} for pair in metrics.pairs
    ]
    return {"rows": rows, "pairs": pairs, "notes": metrics.notes}
