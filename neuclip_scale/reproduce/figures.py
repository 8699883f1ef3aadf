"""The report's pictures: scores of the methods with their intervals, and curves over training."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.comparison.curves import run_curves
from neuclip_scale.comparison.figures import draw_curves
from neuclip_scale.comparison.run_folder import read_runs
from neuclip_scale.files import atomic_file
from neuclip_scale.reproduce.experiment import published_of
from neuclip_scale.reproduce.results import AVERAGE, Results
from neuclip_scale.untrusted_text import in_figure

MAX_PANELS = 6


def draw_figures(results: Results, folder: Path) -> list[Path]:
    """Write what there is to draw; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    if results.scores:
        pictures["scores"] = _scores(results)
    finished = [results.request.places.run(label) for label, run in results.runs.items() if run.summary]
    if finished:
        curves = draw_curves(run_curves(read_runs(finished)))
        pictures |= {f"curve-{number}": picture for number, picture in enumerate(curves.values(), 1)}
    paths = []
    for name, picture in pictures.items():
        paths.append(folder / f"{name}.png")
        with atomic_file(paths[-1]) as file:
            file.write(picture)
    return paths


def _scores(results: Results) -> bytes:
    """A panel for each telling score: every run a point, the mean with its interval, the published as a cross."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    telling = [name for name in results.scores if name == AVERAGE or name.endswith(("top-1", "R@1"))]
    shown = (telling or results.scores)[:MAX_PANELS]
    experiment = results.request.experiment
    published = published_of(experiment).scores
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for number, score in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), number)
        for place, method in enumerate(experiment.methods):
            values = results.by_seed(method, score).values()
            axes.plot([place] * len(values), list(values), "o", color="#3465a4", alpha=0.5, markersize=4)
            found = results.estimate(method, score)
            if found is not None and found.low is not None and found.high is not None:
                spread = [[found.mean - found.low], [found.high - found.mean]]
                axes.errorbar([place], [found.mean], spread, fmt="_", color="#222", capsize=4)
            if score == AVERAGE and method in published:
                axes.plot([place], [published[method]], "x", color="#d9730d")
        axes.set_xticks(range(len(experiment.methods)), experiment.methods, rotation=30, ha="right", fontsize=8)
        axes.set_title(in_figure(score), fontsize=9)
        axes.set_ylabel("points")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
