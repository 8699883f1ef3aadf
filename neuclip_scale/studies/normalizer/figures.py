"""Figures of a study of normalizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuclip_scale.evaluation.figures import COLOURS, new_canvas, save_figure

Row = dict[str, Any]


def error_over_steps(rows: list[Row], path: Path) -> None:
    """Mean squared error of the core estimators over steps, a panel for each (n, batch)."""
    places = sorted({(row["n"], row["batch"]) for row in rows})
    names = [name for name in dict.fromkeys(row["estimator"] for row in rows) if "," not in name or "later" in name]
    figure, panels = new_canvas(5.2 * len(places), 4.2, columns=len(places))
    for axes, (n, batch) in zip([panels] if len(places) == 1 else panels, places, strict=True):
        for number, name in enumerate(names):
            chosen = [r for r in rows if (r["n"], r["batch"], r["estimator"]) == (n, batch, name)]
            steps = sorted({row["step"] for row in chosen})
            means = [_mean([row["mse"] for row in chosen if row["step"] == step]) for step in steps]
            axes.plot(steps, means, "o-", markersize=3, color=COLOURS[number % len(COLOURS)], label=name)
        axes.set(xlabel="step", ylabel="mean squared error", yscale="log", title=f"n = {n:,}, B = {batch}")
    first = panels if len(places) == 1 else panels[0]
    first.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def errors_side_by_side(table: list[Row], path: Path) -> None:
    """Every estimator's error beside the others', a panel for each (n, batch), with the standard error over seeds."""
    places = sorted({(row["n"], row["batch"]) for row in table})
    height = 1.2 + 0.26 * max(sum((r["n"], r["batch"]) == place for r in table) for place in places)
    figure, panels = new_canvas(6.4 * len(places), height, columns=len(places))
    for axes, (n, batch) in zip([panels] if len(places) == 1 else panels, places, strict=True):
        chosen = sorted((r for r in table if (r["n"], r["batch"]) == (n, batch)), key=lambda r: -r["mse"])
        labels = [row["estimator"] for row in chosen]
        spread = [row["mse_error"] or 0 for row in chosen]
        axes.errorbar([row["mse"] for row in chosen], labels, xerr=spread, fmt="o", color=COLOURS[0], markersize=4)
        axes.set(xscale="log", xlabel="mean squared error", title=f"n = {n:,}, B = {batch}")
        axes.tick_params(axis="y", labelsize=8)
        axes.xaxis.set_minor_formatter(lambda value, place: "")  # within one decade its labels run into each other
    save_figure(figure, path)


def gradient_plane(table: list[Row], path: Path) -> None:
    """Bias against noise of the encoders' gradient, a panel for each (n, batch)."""
    places = sorted({(row["n"], row["batch"]) for row in table})
    figure, panels = new_canvas(5.6 * len(places), 4.6, columns=len(places))
    for axes, (n, batch) in zip([panels] if len(places) == 1 else panels, places, strict=True):
        for number, row in enumerate(r for r in table if (r["n"], r["batch"]) == (n, batch)):
            point = row["gradient_noise"], row["gradient_bias"]
            axes.plot(*point, "o", color=COLOURS[number % len(COLOURS)])
            axes.annotate(row["estimator"], point, fontsize=7, xytext=(4, 2), textcoords="offset points")
        axes.set(xlabel="noise / |gradient|", ylabel="bias / |gradient|", title=f"n = {n:,}, B = {batch}")
    save_figure(figure, path)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
