"""What each run took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neuclip_scale.comparison.differences import NOT_RECORDED
from neuclip_scale.comparison.run_folder import RunFolder
from neuclip_scale.comparison.text import number, show

# Key of summary.json -> heading with the unit.
SUMMARY_COSTS = {
    "train_seconds": "training, s",
    "device_hours": "device-hours",
    "samples_per_second": "samples/s",
    "world_size": "world size",
    "device": "device",
}
EXPECTED_COSTS = ("flops", "energy_joules", "energy_source")
"""Keys under `cost` that are shown also where no run has them."""


def costs(runs: Sequence[RunFolder]) -> dict[str, dict[str, Any]]:
    """Label -> heading -> value, `NOT_RECORDED` where there is none; every run has the same headings."""
    recorded = {run.label: _recorded(run) for run in runs}
    headings = dict.fromkeys([*SUMMARY_COSTS.values(), "peak memory, GiB", *EXPECTED_COSTS])
    headings |= dict.fromkeys(name for values in recorded.values() for name in values)
    return {label: {name: values.get(name, NOT_RECORDED) for name in headings} for label, values in recorded.items()}


def cost_text(value: Any) -> str:
    """A cost for a table, numbers to four digits."""
    amount = number(value)
    if amount is None:
        return show(value)
    return f"{amount:,.0f}" if 1000 <= abs(amount) < 1e7 else f"{amount:.4g}"


def _recorded(run: RunFolder) -> dict[str, Any]:
    summary = run.summary or {}
    values = {heading: summary[key] for key, heading in SUMMARY_COSTS.items() if summary.get(key) is not None}
    if run.steps is not None and run.steps.peak_memory_bytes is not None:
        values["peak memory, GiB"] = run.steps.peak_memory_bytes / 2**30
    cost = summary.get("cost")
    if isinstance(cost, dict):
        values |= {name: value for name, value in _flat(cost) if value is not None}
    return values


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
