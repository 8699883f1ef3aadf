"""The report's plots as PNG pictures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neuclip_scale.untrusted_text import in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _GREY = "#3465a4", "#d9730d", "#2e8b57", "#6b6b6b"
_COLOURS = (_BLUE, _ORANGE, _GREEN, "#a23b72")
MAX_BARS = 25
MAX_PANELS = 12


def draw_reasons(reasons: Mapping[str, Mapping[str, int]]) -> bytes:
    """Bars of download -> reason -> samples, side by side."""
    names = sorted({name for counts in reasons.values() for name in counts})
    names.sort(key=lambda name: sum(counts.get(name, 0) for counts in reasons.values()))
    figure, axes = _canvas(0.28 * len(names) * len(reasons) + 1.2)
    height = 0.8 / len(reasons)
    for place, (download, counts) in enumerate(reasons.items()):
        rows = [row + (place - (len(reasons) - 1) / 2) * -height for row in range(len(names))]
        bars = axes.barh(
            rows, [counts.get(name, 0) for name in names], height, color=_colour(place), label=in_figure(download, 50)
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), [in_figure(name.replace("_", " "), 50) for name in names])
    axes.set_xlabel("missing samples")
    axes.margins(x=0.12)
    if len(reasons) > 1:
        axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def draw_places(places: Mapping[str, Any]) -> bytes:
    """The groups that lost most: share lost with its 95 % interval."""
    rows = list(reversed(places["rows"][:MAX_BARS]))
    figure, axes = _canvas(0.24 * len(rows) + 1.0)
    shares = [row["share"] for row in rows]
    errors = [[row["share"] - row["low"] for row in rows], [row["high"] - row["share"] for row in rows]]
    errors = [[max(0.0, value) for value in side] for side in errors]
    axes.errorbar(shares, range(len(rows)), xerr=errors, fmt="o", color=_BLUE, markersize=4, capsize=2, linewidth=1)
    axes.set_yticks(
        range(len(rows)), [in_figure(f"{row['name']} ({row['lost']:,} of {row['total']:,})", 50) for row in rows]
    )
    axes.set(xlim=(-0.02, 1.02), xlabel="share lost, with its 95 % interval")
    return _png(figure)


def draw_numbers(numbers: Sequence[Mapping[str, Any]]) -> bytes:
    """Histograms of numeric columns: samples that are there against those that are missing."""
    shown = numbers[:MAX_PANELS]
    figure, panels = _panels(len(shown))
    for axes, found in zip(panels, shown, strict=False):
        histogram = found["histogram"]
        for side, colour, label in (("kept", _BLUE, "there"), ("missing", _ORANGE, "missing")):
            total = max(1, found[side]["n"])
            axes.stairs([count / total for count in histogram[side]], histogram["edges"], color=colour, label=label)
        axes.set_title(in_figure(found["column"], 50), fontsize=9)
        axes.tick_params(labelsize=7)
    panels[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_categories(categories: Sequence[Mapping[str, Any]]) -> bytes:
    """Shares of the most frequent categories on both sides."""
    shown = categories[:MAX_PANELS]
    figure, panels = _panels(len(shown), height=2.9)
    for axes, found in zip(panels, shown, strict=False):
        rows = found["rows"][:12]
        for place, (side, colour) in enumerate((("kept", _BLUE), ("missing", _ORANGE))):
            total = max(1, sum(row[side] for row in found["rows"]))
            offsets = [row + (place - 0.5) * 0.4 for row in range(len(rows))]
            axes.barh(
                offsets, [row[side] / total for row in rows], 0.4, color=colour, label=("there", "missing")[place]
            )
        axes.set_yticks(range(len(rows)), [in_figure(row["name"], 24) for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(in_figure(found["column"], 50), fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    panels[0].legend(frameon=False, fontsize=8)
    return _png(figure)


def _canvas(height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(10, min(height, 12)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _panels(count: int, height: float = 2.2) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MatplotlibFigure

    rows = (count + 2) // 3
    figure = MatplotlibFigure(figsize=(10, height * rows + 0.3), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    for place, axes in enumerate(panels):
        _plain(axes)
        axes.set_visible(place < count)
    return figure, panels


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Names may hold letters that the font has not; a box in their place is enough.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()
