"""What a study of normalizers shows: figures, a page, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from neuclip_scale.studies.normalizer.figures import error_over_steps, errors_side_by_side, gradient_plane
from neuclip_scale.studies.normalizer.summary import findings, late, summarise, summarise_gradients
from neuclip_scale.studies.page import Page, Section

TRUTH = (
    "The exact value of an anchor is log(eps + g), g the mean of exp((s_ij - s_ii)/tau) over every other pair of the "
    "training set, augmented as in training, encoded with the weights of the same step in evaluation mode, summed in "
    "float64. The anchors are the step's own batch as the estimators saw it, augmented and in training mode. All pairs "
    "are used, so the truth has no sampling error."
)
COST = (
    "Seconds are of one whole evaluation of the objective, its gradient included, on this machine; the mini-batch's "
    "row is what every other row contains."
)
GRADIENT = (
    "At the last step, with frozen weights and without augmentation: the encoders' gradient under each estimator over "
    "batches, each drawn anew from all pairs, against the gradient of RGCL-g over all pairs as one batch with exact "
    "normalizers. Bias and noise are relative to its norm; the bias is the root of the mean over seeds of its square, "
    "less what the mean of few batches adds, or 0 where that is more. A bias below the resolution (of two standard "
    "errors over seeds) is not told from none; exact normalizers have none, so their row shows the same. The anchor "
    "share is 1 where all anchors weigh alike."
)


def write_report(result: dict[str, Any], output: Path) -> list[Path]:
    """Figures and index.html into `output`; returns the files."""
    table = summarise(late(result["rows"]))
    paths = [output / "error_over_steps.png", output / "error.png"]
    error_over_steps(result["rows"], paths[0])
    errors_side_by_side(table, paths[1])
    sections = [
        Section("What the figures say", findings(table)),
        Section("Error of the log-normalizer", [TRUTH, COST], _HEADER, [_cells(row) for row in table], paths[:2]),
    ]
    if result["gradients"]:
        gradients = summarise_gradients(result["gradients"])
        paths.append(output / "gradient.png")
        gradient_plane(gradients, paths[-1])
        cells = [_gradient_cells(row) for row in gradients]
        sections.append(Section("The encoders' gradient", [GRADIENT], _GRADIENT_HEADER, cells, paths[-1:]))
    settings = "\n".join(f"{key}: {value}" for key, value in result["settings"].items())
    sections.append(Section("Settings", [f"torch {result['torch']}, {result['threads']} thread(s)"], code=settings))
    paths.append(output / "index.html")
    Page("Estimates of the log-normalizer against the truth", sections).write(paths[-1])
    return paths


_HEADER = ["estimator", "n", "B", "seeds", "MSE", "of mini-batch's", "bias", "worst tenth", "ms/step"]
_GRADIENT_HEADER = ["estimator", "n", "B", "seeds", "bias", "resolution", "noise", "cosine", "anchor share"]


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["estimator"],
        f"{row['n']:,}",
        str(row["batch"]),
        str(row["num_seeds"]),
        _with_error(row, "mse", 4),
        f"{row['mse_over_batch']:.2f}",
        _with_error(row, "bias", 3),
        _with_error(row, "worst_decile", 3),
        f"{1000 * row['seconds_per_step']:.1f}",
    ]


def _gradient_cells(row: dict[str, Any]) -> list[str]:
    where = [row["estimator"], f"{row['n']:,}", str(row["batch"]), str(row["num_seeds"])]
    resolution = row["gradient_bias_resolution"]
    bias = [f"{row['gradient_bias']:.3f}", "" if resolution is None else f"{resolution:.3f}"]
    return where + bias + [_with_error(row, measure, 3) for measure in ("gradient_noise", "cosine", "anchor_share")]


def _with_error(row: dict[str, Any], measure: str, digits: int) -> str:
    error = row[f"{measure}_error"]
    return f"{row[measure]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def terminal_tables(result: dict[str, Any]) -> list[Table]:
    """The page's tables for a terminal, one for each n and B."""
    errors, gradients = summarise(late(result["rows"])), summarise_gradients(result["gradients"])
    return [
        *_tables("Error of the log-normalizer", _HEADER, errors, _cells),
        *_tables("The encoders' gradient", _GRADIENT_HEADER, gradients, _gradient_cells),
    ]


def _tables(
    title: str, header: list[str], rows: list[dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]
) -> Iterator[Table]:
    """Tables whose n, B and seeds, the same in all rows, stand in the title."""
    for n, batch in sorted({(row["n"], row["batch"]) for row in rows}):
        chosen = [row for row in rows if (row["n"], row["batch"]) == (n, batch)]
        name = f"{title}: n = {n:,}, B = {batch}, {chosen[0]['num_seeds']} seed(s)"
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
        for heading in [header[0], *header[4:]]:
            table.add_column(heading, justify="left" if heading == "estimator" else "right")
        for row in chosen:
            values = cells(row)
            table.add_row(values[0], *values[4:])
        yield table
