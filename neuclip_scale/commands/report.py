"""`neuclip report RUN...`: finished runs side by side, with figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from neuclip_scale.commands.scores import demo_caveat, score_table
from neuclip_scale.comparison import RunFolder
from neuclip_scale.comparison.scores import run_scores
from neuclip_scale.config import Recipe, load_recipe
from neuclip_scale.files import write_json


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Compare finished runs that were evaluated on the same sets: scores beside chance, cost, curves, examples."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    output: Path = Path("runs/report")
    """Folder for report.json and the figures."""
    json: Path | None = None
    """Also write the runs' summaries to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 when a run is not finished or not evaluated, 2 for bad usage."""
    arguments = tyro.cli(ReportArguments, args=argv, prog="neuclip report")
    if not arguments.runs:
        print("error: RUNS: give at least one run folder.", file=sys.stderr)
        return 2
    summaries: dict[str, dict[str, Any]] = {}
    runs = named(arguments.runs)
    for name, run in runs.items():
        path = run / "summary.json"
        try:
            summary = json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            print(f"error: {path}: is not whole ({error}). Restore it, or train the run anew.", file=sys.stderr)
            return 1
        if problem := _unfit(summary) or _no_metrics(run):
            print(f"error: {run}: {problem}", file=sys.stderr)
            return 1
        summaries[name] = summary
    if problem := _unlike(summaries):
        print(f"error: RUNS: {problem} `neuclip compare` tells such runs apart.", file=sys.stderr)
        return 1
    recipe = load_recipe(arguments.runs[0] / "config.yaml")
    console = Console(highlight=False, markup=False, emoji=False)
    labels = short_labels(list(summaries))
    evaluations = [summary["evaluation"] for summary in summaries.values()]
    console.print(score_table(dict(zip(labels, evaluations, strict=True))))
    labelled = dict(zip(labels, summaries.values(), strict=True))
    console.print(costs(labelled))
    if any(summary.get("cost", {}).get("sections") for summary in summaries.values()):
        console.print(shares(labelled))
    console.print(demo_caveat(Path(recipe.evaluation.data)))
    figures = draw(runs, arguments.output, recipe)
    write_json(arguments.output / "report.json", {"runs": summaries})
    if arguments.json:
        write_json(arguments.json, {"runs": summaries})
    for path in [*figures, arguments.output / "report.json"]:
        console.print(f"  {path}")
    console.print(f"curves: tensorboard --logdir {arguments.runs[0].parent}")
    return 0


def _unfit(summary: Any) -> str:
    """Why a run has nothing to report, and what to do; empty where it has."""
    if not isinstance(summary, dict):
        return "summary.json holds no object. Restore it, or train the run anew."
    if summary.get("status") != "finished":
        return "not a finished run. Train it to its end first."
    if not summary.get("evaluation"):
        return "a finished run without an evaluation. Give its command again with --evaluation.data SETS."
    return ""


def _no_metrics(run: Path) -> str:
    return "" if (run / "metrics.jsonl").is_file() else "metrics.jsonl is missing. Copy the whole run folder."


def _unlike(summaries: Mapping[str, dict[str, Any]]) -> str:
    """Why the scores of these runs do not belong into one table; empty where they do."""
    problems: list[str] = []
    found = [run_scores(RunFolder(name, Path(name), summary=each), [], problems) for name, each in summaries.items()]
    if problems:
        return problems[0]
    if any((each.sizes, each.guesses) != (found[0].sizes, found[0].guesses) for each in found):
        return "evaluated on different sets, or on others of the same names; give runs of one evaluation.data."
    return ""


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """Run folders by their names, or by all of their paths where two have one name."""
    names = {run.name: run for run in runs}
    return names if len(names) == len(runs) else {str(run): run for run in runs}


def short_labels(names: list[str]) -> list[str]:
    """Names without the words that all of them begin with: demo-openclip, demo-neuclip -> openclip, neuclip."""
    words = [name.split("-") for name in names]
    while len(names) > 1 and all(len(parts) > 1 and parts[0] == words[0][0] for parts in words):
        words = [parts[1:] for parts in words]
    return ["-".join(parts) for parts in words]


def costs(summaries: dict[str, dict[str, Any]]) -> Table:
    """What each run took; measuring and evaluating are not counted."""
    arithmetic, energy = zip(*(_arithmetic_and_energy(each.get("cost")) for each in summaries.values()), strict=True)
    rows = {
        "minutes": [f"{each['train_seconds'] / 60:.1f}" for each in summaries.values()],
        "pairs/s": [f"{each['samples_per_second']:.0f}" for each in summaries.values()],
        "epochs": [f"{each['epochs']:.1f}" for each in summaries.values()],
        "device-hours": [f"{each['device_hours']:.2f}" for each in summaries.values()],
        "device": [f"{each['world_size']} x {each['device']}" for each in summaries.values()],
        "TFLOPs": arithmetic,
        "energy": energy,
    }
    return _by_run("Cost of training", list(summaries), rows)


def _by_run(title: str, runs: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A column for each run, of which there are fewer than of what is told: it fits a narrow terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run, justify="right", overflow="fold")
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _arithmetic_and_energy(cost: dict[str, Any] | None) -> tuple[str, str]:
    """All that was computed, in 10^12 FLOPs, and watt-hours."""
    if cost is None:  # a run of older code
        return "-", "-"
    flops = cost["hardware_flops"] + cost["objective_flops"]
    part = " (in part)" if cost["since_step"] else ""  # a run that older code began
    marks = "".join(f" ({word})" for word in ("estimate", "incomplete") if word in cost["energy_source"])
    return f"{flops / 1e12:,.3g}{part}", f"{cost['energy_joules'] / 3600:,.3g} Wh{marks}{part}"


def shares(summaries: dict[str, dict[str, Any]]) -> Table:
    """Where the time of the steps went on rank 0, by the first part of the sections' names."""
    rows: dict[str, dict[str, float]] = {}
    for run, summary in summaries.items():
        rows[run] = {}
        for name, section in summary.get("cost", {}).get("sections", {}).items():
            group = name.partition("/")[0]
            rows[run][group] = rows[run].get(group, 0.0) + section["share"]
    groups = dict.fromkeys(group for row in rows.values() for group in row)
    cells = {group: [f"{row[group]:.1%}" if group in row else "-" for row in rows.values()] for group in groups}
    return _by_run("Share of a step's time", list(rows), cells)


def draw(runs: Mapping[str, Path], output: Path, recipe: Recipe) -> list[Path]:
    """Loss and normalizer-error curves of all runs, and pages of retrievals by the last one."""
    import torch

    from neuclip_scale.checkpoint import load_run_model
    from neuclip_scale.data.transforms import EvalTransform
    from neuclip_scale.evaluation.encoders import Encoders
    from neuclip_scale.evaluation.figures import loss_curve, normalizer_error_curve, read_metrics
    from neuclip_scale.evaluation.pages import draw_retrieval_pages
    from neuclip_scale.models.tokenizer import build_tokenizer

    metrics = {name: run / "metrics.jsonl" for name, run in runs.items()}
    paths = [output / "loss.png"]
    loss_curve(metrics, paths[0])
    measured = {k: v for k, v in metrics.items() if any("normalizer/mse" in line for line in read_metrics(v))}
    if measured:
        paths.append(output / "normalizer_error.png")
        normalizer_error_curve(measured, paths[-1])
    model, trained = load_run_model([*runs.values()][-1])
    transform = EvalTransform(model.image_size, model.image_mean, model.image_std)
    tokenizer = build_tokenizer(trained.model)
    encoders = Encoders(model, tokenizer, transform, torch.device("cpu"))
    return paths + draw_retrieval_pages(encoders, Path(recipe.evaluation.data), output)
