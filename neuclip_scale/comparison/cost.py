"""What each run took: as summary.json tells it, memory of older runs as metrics.jsonl does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuclip_scale.comparison.differences import NOT_RECORDED
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.config import flat_fields
from neuclip_scale.untrusted_text import number, show

ENERGY = "energy, Wh"
"""Heading."""

# Key of summary.json -> heading with the unit.
SUMMARY_COSTS = {
    "train_seconds": "training, s",
    "device_hours": "device-hours",
    "samples_per_second": "pairs/s",
    "world_size": "world size",
    "device": "device",
}
# Key under its `cost` -> (heading with the unit, what the value is divided by).
CONVERTED_COSTS = {
    "peak_memory_bytes": ("peak memory, GiB", 2**30),
    "model_flops": ("model FLOPs", 1),
    "hardware_flops": ("hardware FLOPs", 1),
    "objective_flops": ("objective FLOPs", 1),
    "energy_joules": (ENERGY, 3600),
    "mfu": ("MFU", 1),
}
HEADINGS = (*SUMMARY_COSTS.values(), *(heading for heading, _ in CONVERTED_COSTS.values()))
"""Costs that are shown also where no run has them."""

SOURCE = "energy_source"
"""Key under `cost`: how energy was measured or estimated."""


@dataclass(frozen=True)
class RunCosts:
    """The costs of one run; every run of a comparison has the same names in `main` and in `other`."""

    main: dict[str, Any]
    """Heading -> value, of `HEADINGS`; `NOT_RECORDED` where there is none."""
    source: str
    """How its energy was measured or estimated; empty where it is not told."""
    other: dict[str, Any]
    """What else stands under `cost` in some run, nested names with dots; `NOT_RECORDED` where there is none."""
    shares: dict[str, float]
    """Section of a step -> its share of the step's time, 0 to 1."""

    def document(self) -> dict[str, Any]:
        """Everything as plain values for compare.json."""
        return {**self.other, **self.main, SOURCE: self.source or NOT_RECORDED, "sections": self.shares}


def costs(runs: Sequence[RunFolder]) -> dict[str, RunCosts]:
    """Label -> what the run took."""
    found = {run.label: _of_run(run) for run in runs}
    others = dict.fromkeys(name for each in found.values() for name in each.other)
    return {
        label: RunCosts(
            {name: each.main.get(name, NOT_RECORDED) for name in HEADINGS},
            each.source,
            {name: each.other.get(name, NOT_RECORDED) for name in others},
            each.shares,
        )
        for label, each in found.items()
    }


def cost_text(value: Any) -> str:
    """A cost for a table, numbers to four digits."""
    amount = number(value)
    if amount is None:
        return show(value)
    return f"{amount:,.0f}" if 1000 <= abs(amount) < 1e7 else f"{amount:.4g}"


def _of_run(run: RunFolder) -> RunCosts:
    """What this run alone tells."""
    summary = run.summary or {}
    told = summary.get("cost")
    cost = dict(told) if isinstance(told, dict) else {}
    main = {}
    for key, heading in SUMMARY_COSTS.items():
        again = cost.pop(key, None)
        if (value := summary.get(key, again)) is not None:
            main[heading] = value
    for key, (heading, unit) in CONVERTED_COSTS.items():
        amount = number(cost.pop(key, None))
        if amount is None and key == "peak_memory_bytes" and run.steps is not None:
            amount = run.steps.peak_memory_bytes
        if amount is not None:
            main[heading] = amount / unit
    source, sections = cost.pop(SOURCE, None), cost.pop("sections", None)
    shares = {}
    for name, section in sections.items() if isinstance(sections, dict) else ():
        share = number(section.get("share")) if isinstance(section, dict) else None
        if share is not None:
            shares[name] = share
    other = {name: value for name, value in flat_fields(cost) if value is not None}
    return RunCosts(main, show(source) if source else "", other, shares)
