"""The curves as PNG pictures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from neuclip_scale.comparison.curves import Curve, RunCurves
from neuclip_scale.untrusted_text import in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Draws a curve over the given positions, with colour, dashes and label.
Draw = Callable[["Axes", list[float], Curve, dict[str, str]], None]

_COLOURS = ("#3465a4", "#d9730d", "#2e8b57", "#a23b72", "#6b6b6b", "#b8860b", "#5b4b8a", "#008b8b")
_DASHES = ("-", "--", ":", "-.")
MAX_SCORES = 8
"""Scores that are drawn, most telling ones first."""


def draw_curves(curves: Sequence[RunCurves]) -> dict[str, bytes]:
    """Title -> PNG: the loss, then each score that is in some run's metrics; empty without any point."""
    pictures = {}
    losses = {run.label: run.loss for run in curves if run.loss.values}
    if losses:
        pictures["Training loss"] = _panel(losses, "training loss", _draw_loss, from_zero=False)
    for name in drawn_scores(curves):
        scores = {run.label: run.evaluations[name] for run in curves if name in run.evaluations}
        pictures[name] = _panel(scores, name, _draw_score, from_zero=True)
    return pictures


def drawn_scores(curves: Sequence[RunCurves]) -> list[str]:
    """Names of the scores to draw: top-1 and recall@1 where there are such, without chance and counts."""
    names = dict.fromkeys(name for run in curves for name in run.evaluations)
    scores = [name for name in names if not any(word in name for word in ("chance", "num_", "majority"))]
    first = [name for name in scores if name.endswith(("top1", "recall@1"))]
    return (first or scores)[:MAX_SCORES]


def _panel(curves: Mapping[str, Curve], heading: str, draw: Draw, *, from_zero: bool) -> bytes:
    """One quantity over samples on the left, over seconds on the right."""
    figure, (over_samples, over_seconds) = _canvas()
    for number, (label, curve) in enumerate(curves.items()):
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
            "label": in_figure(label, 60),
        }
        shown = _drawable(curve)
        draw(over_samples, shown.samples, shown, style)
        draw(over_seconds, shown.seconds, shown, style)
    over_samples.set(xlabel="pairs seen", ylabel=in_figure(heading, 60))
    over_seconds.set(xlabel="seconds of training")
    if from_zero:  # an axis that begins elsewhere makes a difference look as large as one likes
        low, high = over_samples.get_ylim()
        over_samples.set_ylim(min(0.0, low), high + 0.06 * abs(high))
    for axes in (over_samples, over_seconds):
        axes.set_xlim(0, 1.02 * axes.get_xlim()[1])
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.legend(*over_samples.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Names may hold letters that the font has not; a box in their place is enough.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _drawable(curve: Curve) -> Curve:
    """`curve` without points so far out that axes cannot be computed in float64."""
    points = zip(curve.samples, curve.seconds, curve.values, strict=True)
    near = [point for point in points if max(map(abs, point)) < 1e30]
    return Curve(*(list(column) for column in zip(*near, strict=True))) if near else Curve()


def _draw_loss(axes: Axes, positions: list[float], curve: Curve, style: dict[str, str]) -> None:
    """The points thin, a running mean thick."""
    axes.plot(positions, curve.values, color=style["color"], alpha=0.22, linewidth=0.8)
    axes.plot(positions, _running_mean(np.asarray(curve.values)), color=style["color"], linestyle=style["linestyle"],
              linewidth=1.8, label=style["label"])  # fmt: skip


def _draw_score(axes: Axes, positions: list[float], curve: Curve, style: dict[str, str]) -> None:
    axes.plot(positions, curve.values, marker="o", markersize=3.5, color=style["color"],
              linestyle=style["linestyle"], linewidth=1.5, label=style["label"])  # fmt: skip


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fortieth of the curve, shorter at both ends."""
    half = max(1, len(values) // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low))


def _canvas() -> tuple[Figure, tuple[Axes, Axes]]:
    """A figure with its own Agg canvas: no window, and no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(10.5, 3.8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, (left, right)
