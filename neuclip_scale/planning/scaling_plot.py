"""Plans of scaling drawn: pairs a second over GPUs, a row for each recipe, by what `--json` wrote."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neuclip_scale.config import ConfigError
from neuclip_scale.untrusted_text import in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#222222", "#4477aa", "#228833", "#ee6677", "#ccbb44", "#aa3377")
STYLES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
MAX_BYTES = 64 << 20


def read_document(path: Path) -> dict[str, Any]:
    """What `--json` wrote of another recipe; raises `ConfigError` for anything else."""
    remedy = "Give what `neuclip plan RECIPE --scaling --json FILE` wrote."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError("--beside", str(path), f"more than {MAX_BYTES >> 20} MiB", remedy)
        document = json.loads(path.read_bytes())
        for line in document["lines"]:
            names = line["regime"], line["engine"], line["interconnect"], document["recipe"]
            numbers = [float(point[key]) for point in line["points"] for key in ("gpus", "pairs_per_second")]
            problems = [point["problem"] for point in line["points"]]
            if not all(isinstance(each, str) for each in (*names, *problems)) or not all(map(_is_positive, numbers)):
                raise ValueError("a line has no names or numbers above zero")
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            "--beside", str(path), f"cannot be drawn ({type(error).__name__}: {error})", remedy
        ) from error
    return dict(document)


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def draw(documents: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: a row for each document, strong scaling left and weak right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    engines = list(dict.fromkeys(line["engine"] for document in documents for line in document["lines"]))
    networks = list(dict.fromkeys(line["interconnect"] for document in documents for line in document["lines"]))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(engines)}
    styles = {name: STYLES[place % len(STYLES)] for place, name in enumerate(networks)}
    figure = Figure(figsize=(10, 3.6 * len(documents) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(documents), 2, squeeze=False)
    for row, document in zip(axes, documents, strict=True):
        for panel, regime in zip(row, ("strong", "weak"), strict=True):
            lines = [line for line in document["lines"] if line["regime"] == regime]
            _panel(panel, lines, colours, styles)
            panel.set_title(in_figure(f"{document['recipe']}, {regime}: {_told(document, regime)}"), fontsize=10)
    measured = all(document.get("measured") for document in documents)
    told = "calculated from speeds measured on one GPU" if measured else "calculated, not measured"
    figure.suptitle(told, fontsize=9, color="#666666")
    figure.legend(handles=_keys(colours, styles), loc="outside lower center", ncols=5, fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _told(document: Mapping[str, Any], regime: str) -> str:
    sweep = document.get("sweep", {})
    if regime == "weak":
        return f"{sweep.get('pairs_per_gpu', '')} pairs a GPU"
    sizes = {point["global_batch_size"] for line in document["lines"] if line["regime"] == regime
             for point in line["points"]}  # fmt: skip
    return f"{min(sizes):,} pairs a step" if sizes else "strong scaling"


def _panel(
    panel: Axes, lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str], styles: Mapping[str, Any]
) -> None:
    """Lines as far as they fit, and the ideal: as many times the best GPU's as there are GPUs."""
    drawn = []
    for line in lines:
        points = [(p["gpus"], p["pairs_per_second"]) for p in line["points"] if not p["problem"]]
        drawn += points
        colour, style = colours[line["engine"]], styles[line["interconnect"]]
        panel.plot([x for x, _ in points], [y for _, y in points], color=colour, linestyle=style, linewidth=1.4)
    if drawn:
        rate, gpus = max(y / x for x, y in drawn), sorted({x for x, _ in drawn})
        panel.plot(gpus, [rate * x for x in gpus], color="#bbbbbb", linewidth=4, zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(gpus, [f"{x:,}" for x in gpus])
        panel.set_xticks([], minor=True)
    panel.set_xlabel("GPUs")
    panel.set_ylabel("pairs a second")
    panel.grid(alpha=0.3)


def _keys(colours: Mapping[str, str], styles: Mapping[str, Any]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        *(Line2D([], [], color=colour, label=in_figure(name)) for name, colour in colours.items()),
        *(Line2D([], [], color="#222222", linestyle=style, label=in_figure(name)) for name, style in styles.items()),
        Line2D([], [], color="#bbbbbb", linewidth=4, label="ideal"),
    ]
