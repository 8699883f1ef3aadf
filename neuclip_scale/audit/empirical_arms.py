"""Which pairs each arm of an empirical check trains on: two downloads, what they share, and random drops as large."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from neuclip_scale.reshard.request import SUBSET_DTYPE, load_request

ROLES = ("first", "second", "common")


class EmpiricalError(ValueError):
    """An empirical check that cannot be made; the message names the field, the value and the remedy."""


@dataclass(frozen=True)
class Arms:
    """Arms by name, and which of them stand for a role."""

    rows: dict[str, np.ndarray]
    """Arm -> its pairs, as sorted rows of `union`."""
    union: np.ndarray
    """[n] u8,u8, the uids of either download, sorted."""
    arm_of: dict[str, str]
    """Role -> its arm; roles with the same pairs share one."""
    drops_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Role -> arms of as many pairs, drawn from the union; itself where it holds the whole union."""

    def uids(self, arm: str) -> np.ndarray:
        """[k] u8,u8, sorted, as `neuclip reshard` takes them."""
        return self.union[self.rows[arm]]


def plan_arms(
    first: np.ndarray, second: np.ndarray, common: np.ndarray | None, drops: int, max_pairs: int = 0, seed: int = 0
) -> Arms:
    """Arms of two downloads, u8,u8 uids each; `common` None takes what is in both.

    `max_pairs` above 0 first draws as many pairs from the union and keeps of each list what is among them. Equal
    arguments, equal arms. Raises `EmpiricalError` for lists that leave an arm empty, and for common pairs that one
    side lacks.
    """
    first, second = np.unique(first), np.unique(second)
    union = np.union1d(first, second)
    generator = np.random.default_rng(seed)
    if 0 < max_pairs < len(union):
        union = np.sort(generator.choice(union, max_pairs, replace=False))
    inside = {"first": np.isin(union, first), "second": np.isin(union, second)}
    both = inside["first"] & inside["second"]
    inside["common"] = both if common is None else np.isin(union, common)
    if (inside["common"] & ~both).any():
        number = int((inside["common"] & ~both).sum())
        raise EmpiricalError(f"common: {number:,} of its pairs are not in both downloads. Give pairs of both.")
    rows = {role: np.flatnonzero(inside[role]) for role in ROLES}
    for role, chosen in rows.items():
        if not len(chosen):
            raise EmpiricalError(f"{role}: holds no pair of {len(union):,}. Check the list, or raise max_pairs.")
    arm_of = {role: next(other for other in ROLES if np.array_equal(rows[other], rows[role])) for role in ROLES}
    arms = {role: rows[role] for role in dict.fromkeys(arm_of.values())}
    drops_of: dict[str, tuple[str, ...]] = {}
    for role in tuple(arms):
        size = len(arms[role])
        names = tuple(f"{role}-drop{number}" for number in range(1, drops + 1))
        drops_of[role] = names if size < len(union) else (role,) * drops
        for name in names if size < len(union) else ():
            arms[name] = np.sort(generator.choice(len(union), size, replace=False))
    return Arms(arms, union, arm_of, {role: drops_of[arm_of[role]] for role in ROLES})


def read_uids(path: Path, name: str) -> np.ndarray:
    """[n] u8,u8 of a list of uids in any form that `neuclip reshard` takes.

    Raises `EmpiricalError` for uids that are no 32 hexadecimal digits, `ReshardError` for a list that is none.
    """
    request = load_request(path)
    if request.texts:
        text = next(iter(request.texts.values()))
        raise EmpiricalError(f"{name} {path}: uid {text[:60]!r} is no 32 hexadecimal digits. Give DataComp's uids.")
    found = np.empty(len(request.uids.high), dtype=SUBSET_DTYPE)
    found["f0"], found["f1"] = request.uids
    return found
