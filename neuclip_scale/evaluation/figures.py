"""Pictures for reports: loss curves, the error of the normalizer, and a page of retrieval results."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neuclip_scale.untrusted_text import in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3465a4", "#d9730d", "#2e8b57", "#a23b72", "#6b6b6b", "#b8860b", "#5b4b8a", "#008b8b")
_RIGHT, _WRONG, _INK = "#2e9e4f", "#d0d0d0", "#222222"
_TOP = 5


def loss_curve(runs: Mapping[str, Path], out_png: Path) -> None:
    """Training loss over pairs seen, one line per run; `runs` maps a label to its metrics.jsonl.

    The thin line is every step, the thick one a running mean. Losses of different objectives are different
    functions: compare shapes, not heights. Raises ValueError if a file has no loss.
    """
    figure, axes = new_canvas(8.0, 4.5)
    for number, (label, path) in enumerate(runs.items()):
        lines = [line for line in read_metrics(path) if "loss" in line]
        if not lines:
            raise ValueError(f"{path}: no line has a loss; give the metrics.jsonl of a training run")
        seen = np.array([line.get("samples_seen", line["step"]) for line in lines], dtype=float)
        loss = np.array([float(line["loss"]) for line in lines], dtype=float)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(seen, loss, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(seen, _running_mean(loss), color=colour, linewidth=1.9, label=in_figure(label))
    axes.set(xlabel="pairs seen", ylabel="training loss", title="Training loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(frameon=False)
    save_figure(figure, out_png)


def normalizer_error_curve(runs: Mapping[str, Path], out_png: Path) -> None:
    """Error of the log-normalizer against its exact value over steps, beside the mini-batch estimate on the
    same anchors.

    `runs` maps a label to a metrics.jsonl that has lines with `normalizer/mse`, `normalizer/bias` and
    `normalizer/mse_batch`. Raises ValueError if one has none.
    """
    figure, (squared, bias) = new_canvas(11.0, 4.5, columns=2)
    for number, (label, path) in enumerate(runs.items()):
        lines = [line for line in read_metrics(path) if "normalizer/mse" in line]
        if not lines:
            raise ValueError(
                f"{path}: no line has normalizer/mse; train with evaluation.normalizer_every_steps above 0"
            )
        steps = [line["step"] for line in lines]
        colour = COLOURS[number % len(COLOURS)]
        squared.plot(
            steps,
            [float(line["normalizer/mse"]) for line in lines],
            "o-",
            color=colour,
            markersize=3,
            label=in_figure(label),
        )
        batch = [float(line.get("normalizer/mse_batch", "nan")) for line in lines]
        squared.plot(
            steps, batch, "o--", color=colour, alpha=0.5, markersize=3, label=f"{in_figure(label)}: mini-batch alone"
        )
        bias.plot(
            steps,
            [float(line["normalizer/bias"]) for line in lines],
            "o-",
            color=colour,
            markersize=3,
            label=in_figure(label),
        )
    squared.set(xlabel="step", ylabel="mean squared error", title="Log-normalizer against its exact value")
    squared.set_yscale("log")
    squared.legend(frameon=False, fontsize=8)
    bias.axhline(0, color=_INK, linewidth=0.8)
    bias.set(xlabel="step", ylabel="estimate - exact", title="Bias")
    bias.legend(frameon=False, fontsize=8)
    save_figure(figure, out_png)


def retrieval_page(
    image_features: Tensor,
    text_features: Tensor,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    out_png: Path,
    *,
    num_queries: int = 8,
    seed: int = 0,
    title: str = "Retrieval, queries drawn at random",
) -> None:
    """A page of queries drawn by `seed`: a name and the five nearest pictures, a picture and the five nearest
    names.

    Shapes: features [N, d], unit rows, pair i is `pictures[i]` and `captions[i]`. What belongs to the query
    is framed or written in green. The queries are a random draw, not chosen for their looks.
    """
    similarity = text_features.float().cpu() @ image_features.float().cpu().T  # [N texts, N pictures]
    count = min(num_queries, len(captions))
    draw = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    rows = draw[:count].tolist()
    figure = _figure(12.5, 0.9 * count + 1.2)
    grid = figure.add_gridspec(
        count, 2 + _TOP + 2, width_ratios=[2.1, *[1.0] * _TOP, 0.35, 1.0, 3.4], hspace=0.16, wspace=0.08,
        left=0.01, right=0.995, bottom=0.02, top=1 - 0.85 / (0.9 * count + 1.2),
    )  # fmt: skip
    for row, query in enumerate(rows):
        label = _blank(figure.add_subplot(grid[row, 0]))
        label.text(
            0.96, 0.5, in_figure(textwrap.fill(captions[query], 20)), ha="right", va="center", fontsize=11, color=_INK
        )
        for rank, found in enumerate(_nearest(similarity[query])):
            _picture(figure.add_subplot(grid[row, 1 + rank]), pictures[found], _RIGHT if found == query else _WRONG)
        _picture(figure.add_subplot(grid[row, _TOP + 2]), pictures[query], _INK)
        found_names = [(captions[found], found == query) for found in _nearest(similarity[:, query])]
        _names(figure.add_subplot(grid[row, _TOP + 3]), found_names)
    figure.text(
        0.5, 1 - 0.12 / figure.get_figheight(), in_figure(title), ha="center", va="top", fontsize=14, fontweight="bold"
    )
    heading = 1 - 0.55 / figure.get_figheight()
    figure.text(0.36, heading, "name  →  five nearest pictures", ha="center", va="top", fontsize=11)
    figure.text(0.83, heading, "picture  →  five nearest names", ha="center", va="top", fontsize=11)
    save_figure(figure, out_png)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a kill is left out. Raises ValueError for
    others.
    """
    lines = Path(path).read_text("utf-8").splitlines()
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return values


def _nearest(scores: Tensor) -> list[int]:
    return [int(i) for i in scores.topk(min(_TOP, len(scores))).indices]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fortieth of the run, shorter at both ends."""
    half = max(1, len(values) // 80)
    total = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    low, high = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low))


def _figure(width: float, height: float) -> Figure:
    """A figure with its own Agg canvas: no window, and no global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = _figure(width, height)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, columns)
    everything: Iterable[Axes] = np.atleast_1d(axes)
    for each in everything:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def _blank(axes: Axes) -> Axes:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return axes


def _picture(axes: Axes, picture: Image.Image, frame: str) -> None:
    axes.imshow(np.asarray(picture.convert("RGB")))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=3.2 if frame == _RIGHT else 1.0)


def _names(axes: Axes, names: Sequence[tuple[str, bool]]) -> None:
    """A ranked list; each name comes with whether it is right."""
    _blank(axes)
    for rank, (name, right) in enumerate(names):
        text = in_figure(f"{rank + 1}  {textwrap.shorten(name, 42, placeholder=' ...')}")
        colour, weight = (_RIGHT, "bold") if right else ("#555555", "normal")
        axes.text(0.03, 0.9 - 0.2 * rank, text, va="center", fontsize=9, color=colour, fontweight=weight)


def save_figure(figure: Figure, path: Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
