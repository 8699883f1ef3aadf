"""`python -m neuclip_scale.commands.demo_report RUN...`: finished runs side by side, with figures."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from neuclip_scale.commands.evaluate import demo_caveat
from neuclip_scale.config import Recipe, load_recipe
from neuclip_scale.telemetry.files import write_json


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Compare finished runs of one recipe: scores beside chance, cost, curves, example retrievals."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    output: Path = Path("runs/demo-report")
    """Folder for report.json and the figures."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, or 1 when a run is not finished."""
    arguments = tyro.cli(ReportArguments, args=argv, prog="demo_report")
    summaries: dict[str, dict[str, Any]] = {}
    for run in arguments.runs:
        path = run / "summary.json"
        summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if summary.get("status") != "finished" or not summary.get("evaluation"):
            print(f"error: {run}: not a finished, evaluated run. Train it first (make demo).", file=sys.stderr)
            return 1
        summaries[run.name] = summary
    recipe = load_recipe(arguments.runs[0] / "config.yaml")
    console = Console(highlight=False)
    console.print(comparison(summaries))
    console.print(demo_caveat(Path(recipe.evaluation.data)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures = draw(arguments.runs, arguments.output, recipe)
    write_json(arguments.output / "report.json", {"runs": summaries})
    for path in [*figures, arguments.output / "report.json"]:
        console.print(f"  {path}", markup=False)
    console.print(f"curves: tensorboard --logdir {arguments.runs[0].parent}", markup=False)
    return 0


def comparison(summaries: dict[str, dict[str, Any]]) -> Table:
    """One column per run, one row per score or cost."""
    table = Table(title="Held-out clip art", title_justify="left")
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    for name in ("chance", "majority"):
        table.add_column(name, justify="right")
    first = next(iter(summaries.values()))["evaluation"]
    for set_name, scores in first.items():
        for label, keys, baselines in _measures(scores):
            values = [_percent(_dig(summary["evaluation"][set_name], keys)) for summary in summaries.values()]
            base = [_percent(_dig(scores, baseline)) if baseline else "" for baseline in baselines]
            table.add_row(f"{set_name}: {label}", *values, *base)
        table.add_section()
    for label, key, form in (
        ("training, minutes", "train_seconds", lambda v: f"{v / 60:.1f}"),
        ("pairs per second", "samples_per_second", lambda v: f"{v:.0f}"),
        ("epochs", "epochs", lambda v: f"{v:.1f}"),
    ):
        table.add_row(label, *(form(summary[key]) for summary in summaries.values()), "", "")
    return table


Keys = tuple[str, ...]


def _measures(scores: dict[str, Any]) -> list[tuple[str, Keys, tuple[Keys, Keys]]]:
    """(label, where the score stands, where chance and majority stand)."""
    none: Keys = ()
    if scores["task"] == "zeroshot":
        return [
            ("top-1", ("top1",), (("chance_top1",), ("majority",))),
            ("top-5", ("top5",), (("chance_top5",), none)),
        ]
    rows: list[tuple[str, Keys, tuple[Keys, Keys]]] = []
    for direction in ("image_to_text", "text_to_image"):
        for measure in scores[direction]:
            label = f"{direction.replace('_', ' ')} {measure.replace('recall', 'R')}"
            rows.append((label, (direction, measure), ((f"chance_{direction}", measure), none)))
    return rows


def _dig(tree: Any, keys: Keys) -> float:
    for key in keys:
        tree = tree[key]
    return float(tree)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def draw(runs: tuple[Path, ...], output: Path, recipe: Recipe) -> list[Path]:
    """Loss and normalizer-error curves of all runs, and a page of retrievals by the last one."""
    import torch

    from neuclip_scale.checkpoint import load_run_model
    from neuclip_scale.data.transforms import EvalTransform
    from neuclip_scale.evaluation.figures import loss_curve, normalizer_error_curve, read_metrics
    from neuclip_scale.evaluation.pages import draw_retrieval_pages
    from neuclip_scale.models.tokenizer import build_tokenizer

    metrics = {run.name: run / "metrics.jsonl" for run in runs}
    paths = [output / "loss.png"]
    loss_curve(metrics, paths[0])
    measured = {k: v for k, v in metrics.items() if any("normalizer/mse" in line for line in read_metrics(v))}
    if measured:
        paths.append(output / "normalizer_error.png")
        normalizer_error_curve(measured, paths[-1])
    model, trained = load_run_model(runs[-1])
    transform = EvalTransform(model.image_size, model.image_mean, model.image_std)
    folder = Path(recipe.evaluation.data)
    tokenizer = build_tokenizer(trained.model)
    return paths + draw_retrieval_pages(model, folder, tokenizer, transform, torch.device("cpu"), output)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
