"""A study's rows as means over measurements and seeds, with the spread over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

MEASURES = ("mse", "bias", "worst_decile", "seconds_per_step")
GRADIENT_MEASURES = ("gradient_bias_squared", "gradient_noise", "cosine", "anchor_share")

Row = dict[str, Any]


def late(rows: Iterable[Row]) -> list[Row]:
    """Rows of each trajectory after its first fifth, when estimators have a past."""
    listed = list(rows)
    last = max((row["step"] for row in listed), default=0)
    return [row for row in listed if row["step"] > last / 5]


def summarise(rows: Iterable[Row], measures: tuple[str, ...] = MEASURES) -> list[Row]:
    """One row for each (n, batch, estimator): the mean over seeds of each seed's mean, and the standard error.

    `mse_over_batch` is the error over the mini-batch's of the same n and batch.
    """
    groups: dict[tuple[int, int, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["n"], row["batch"], row["estimator"]][row["seed"]].append(row)
    table = []
    for (n, batch, estimator), seeds in groups.items():
        result: Row = {"n": n, "batch": batch, "estimator": estimator, "num_seeds": len(seeds)}
        for measure in measures:
            values = [sum(row[measure] for row in part) / len(part) for part in seeds.values()]
            result[measure] = sum(values) / len(values)
            result[f"{measure}_error"] = _standard_error(values)
        table.append(result)
    if "mse" in measures:
        base = {(row["n"], row["batch"]): row["mse"] for row in table if row["estimator"] == "mini-batch"}
        for row in table:
            row["mse_over_batch"] = row["mse"] / base[row["n"], row["batch"]]
    return table


def summarise_gradients(rows: Iterable[Row]) -> list[Row]:
    """`summarise` of the encoders' gradient, with `gradient_bias`, the root of the mean of its squares.

    `gradient_bias_resolution` is the root of two standard errors of that mean: a bias below it is not told from none.
    None for one seed.
    """
    table = summarise(rows, GRADIENT_MEASURES)
    for row in table:
        error = row["gradient_bias_squared_error"]
        row["gradient_bias"] = math.sqrt(max(0.0, row["gradient_bias_squared"]))
        row["gradient_bias_resolution"] = None if error is None else math.sqrt(2 * error)
    return table


def _standard_error(values: list[float]) -> float | None:
    """Of the mean; None for one seed, which says nothing of the spread."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def findings(table: list[Row]) -> list[str]:
    """The paper's qualitative claims, each said to hold or not by these figures; only those the study can judge."""
    by_name: dict[str, dict[tuple[int, int], Row]] = defaultdict(dict)
    for row in table:
        by_name[row["estimator"]][row["n"], row["batch"]] = row
    sentences = []
    places = sorted(by_name["mini-batch"])
    if len(places) > 1:
        ratio = {place: place[0] / place[1] for place in places}
        most, least = max(places, key=ratio.__getitem__), min(places, key=ratio.__getitem__)
        for name in ("mini-batch", "u table", "NPN", "queue"):
            if not {most, least} <= set(by_name[name]):
                continue
            growth = by_name[name][most]["mse"] / by_name[name][least]["mse"]
            sentences.append(
                f"{name}: the error at n/B = {ratio[most]:.0f} is {growth:.1f} times that at {ratio[least]:.0f}."
            )
    for name in ("NPN, T_u 1", "NPN, T_u 30", "NPN, no restart"):
        if name in by_name and "NPN" in by_name:
            pairs = [(by_name[name][place]["mse"], by_name["NPN"][place]["mse"]) for place in places]
            worse = sum(changed > base for changed, base in pairs)
            factors = ", ".join(f"{changed / base:.2f}" for changed, base in pairs)
            sentences.append(
                f"{name}: worse than the NPN as published in {worse} of {len(pairs)} settings ({factors})."
            )
    return sentences
