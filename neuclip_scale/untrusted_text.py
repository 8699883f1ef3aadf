"""What files of others say, made safe to print, to compare and to write: nothing in it is trusted."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_SHOWN = 160
"""Characters of a value that tables show."""


def printable(text: str) -> str:
    """`text` with everything that is not a printable character as an escape: no control sequence reaches a terminal,
    and what is not UTF-8 (a lone surrogate) can be written."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plain(value: Any) -> Any:
    """A copy of what a YAML or JSON file held as dicts, lists, numbers, booleans, None and printable text."""
    if isinstance(value, dict):
        return {printable(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return printable(str(value))


def show(value: Any) -> str:
    """One line for a table; text as it is, anything else as JSON, cut after `MAX_SHOWN` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def in_figure(text: str, at_most: int = 0) -> str:
    """`text` so that matplotlib shows it, cut to `at_most` characters unless 0: dollars start no formula, and a first
    underscore hides no legend entry."""
    shown = f"{text[: at_most - 1]}…" if at_most and len(text) > at_most else text
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def number(value: Any) -> float | None:
    """`value` as a finite float; None for anything that is not one, "NaN" and booleans included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def unique(names: list[str]) -> list[str]:
    """`names` with a number after those that stood there before: labels are keys, and none may hide another."""
    chosen: list[str] = []
    for name in names:
        count, candidate = 1, name
        while candidate in chosen:
            count += 1
            candidate = f"{name} ({count})"
        chosen.append(candidate)
    return chosen


def listed(names: list[str], most: int = 8) -> str:
    """Names with commas; after `most` only how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
