"""A run folder as far as it can be read: every file on its own, with what is missing or torn said in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuclip_scale.comparison.event_files import read_event_scores
from neuclip_scale.comparison.recipe_file import RecipeFile, read_recipe
from neuclip_scale.comparison.steps import Steps, read_evaluations, read_steps
from neuclip_scale.data.manifest import Manifest, ManifestError
from neuclip_scale.untrusted_text import plain, printable, show, unique


@dataclass(frozen=True)
class ShardList:
    """What manifest.json says of the training data."""

    fingerprint: str
    """32 hex digits over the shards' names, counts and sizes."""
    num_shards: int
    num_samples: int


@dataclass
class RunFolder:
    """One run; a part that could not be read is None and has its line in `problems`."""

    label: str
    """Printable and different for every run of a comparison."""
    path: Path
    recipe: RecipeFile | None = None
    environment: dict[str, Any] | None = None
    shards: ShardList | None = None
    steps: Steps | None = None
    summary: dict[str, Any] | None = None
    num_listed_skips: int = 0
    """Lines in skipped/: bad samples and shards, those met again after resuming included."""
    problems: list[str] = field(default_factory=list)

    @property
    def seed(self) -> Any:
        """The recipe's seed, else the summary's, else None."""
        if self.recipe is not None:
            return self.recipe.fields.get("seed")
        return (self.summary or {}).get("seed")


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Read every folder; never raises for what stands in one."""
    return [read_run(path, label) for path, label in zip(paths, labels(paths), strict=True)]


def labels(paths: Sequence[Path]) -> list[str]:
    """A printable name per folder: of its path's end as much as tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts), default=1)
    chosen = []
    for own in parts:
        ends = (own[-length:] for length in range(1, longest + 1))
        end = next((end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1), own)
        chosen.append(printable(str(Path(*end))))
    return unique(chosen)


def read_run(path: Path, label: str) -> RunFolder:
    """Read one folder; never raises for what stands in it."""
    run = RunFolder(label, path)
    run.recipe = _part(run, "config.yaml", read_recipe, "The recipe is unknown, so it counts as an arm of its own")
    run.environment = _part(run, "environment.json", _read_object, "Code version and machine are unknown")
    run.shards = _part(run, "manifest.json", _read_shards, "Its data cannot be told from other data")
    run.steps = _part(run, "metrics.jsonl", read_steps, "No curve, and no proof of which samples it saw")
    run.summary = _part(run, "summary.json", _read_object, "It has not finished or stopped: no scores, no cost")
    _add_evaluations(run)
    run.num_listed_skips = _count_skips(run)
    _check_steps_agree(run)
    return run


def _part(run: RunFolder, name: str, read: Any, consequence: str) -> Any:
    """What `read(path)` returns as (value, problems), or None with a problem if the file is not there or not whole."""
    path = run.path / name
    shown = printable(str(path))
    try:
        if not path.is_file():
            run.problems.append(f"{shown}: missing. {consequence}. Copy the whole run folder, or finish the run.")
            return None
        value, problems = read(path)
    except (OSError, ValueError, OverflowError, TypeError, AttributeError, RecursionError) as error:
        reason = printable(str(error))[:300]
        run.problems.append(f"{shown}: cannot be read ({reason}). {consequence}. Restore the file.")
        return None
    run.problems += problems
    return value


def _read_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return plain(value), []


def _read_shards(path: Path) -> tuple[ShardList, list[str]]:
    try:
        manifest = Manifest.load(path)
    except ManifestError as error:
        # Its remedy, to delete the file, is for a run that goes on; here it would destroy the evidence.
        raise ValueError(str(error).removesuffix(" Delete it: it is made anew.")) from error
    return ShardList(manifest.fingerprint, len(manifest.shards), int(manifest.num_samples)), []


def _add_evaluations(run: RunFolder) -> None:
    """Scores measured during training: of their record, or of TensorBoard's files where others made the run."""
    if run.steps is None:
        return
    path = run.path / "evaluations.jsonl"
    try:
        if path.exists():
            scores, problems = read_evaluations(path)
            run.problems += problems
            run.steps.evaluations |= scores
        else:
            path = run.path / "tensorboard"
            run.steps.evaluations = read_event_scores(path) | run.steps.evaluations
    except (OSError, ValueError) as error:
        reason = printable(str(error))[:300]
        run.problems.append(f"{printable(str(path))}: cannot be read ({reason}). No curves of scores; restore it.")


def _count_skips(run: RunFolder) -> int:
    count = 0
    for path in sorted(run.path.glob("skipped/*.jsonl")):
        try:
            count += path.read_bytes().count(b"\n")
        except OSError as error:
            run.problems.append(f"{printable(str(path))}: cannot be read ({error.strerror}). Restore the file.")
    return count


def _check_steps_agree(run: RunFolder) -> None:
    """A run killed after it was resumed leaves a summary of its earlier stop."""
    if run.summary is None or run.steps is None or not run.steps.by_number:
        return
    told = run.summary.get("step")
    if told != run.steps.last:
        run.problems.append(
            f"{printable(str(run.path / 'summary.json'))}: step = {show(told)}, but metrics.jsonl ends at step "
            f"{run.steps.last}. Scores and cost may be of another moment; let the run finish."
        )
