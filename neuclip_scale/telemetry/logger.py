"""The record of a training run: metrics.jsonl, TensorBoard, the console and environment.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rich.console import Console

from neuclip_scale.files import append_whole, atomic_file, json_ready, naming, write_json, write_text
from neuclip_scale.telemetry.console import ConsoleProgress
from neuclip_scale.telemetry.environment import environment
from neuclip_scale.telemetry.meter import ThroughputMeter, peak_memory_bytes
from neuclip_scale.telemetry.starts import Lost, lost_so_far, note_start

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class RunLogger:
    """Writes what a run does, on rank 0; on other ranks every method returns at once. No communication.

    `RUN/metrics.jsonl` gets every step, `RUN/evaluations.jsonl` every evaluation, TensorBoard and the console every
    `log_every` steps and the last. When a run resumes after `resume_step`, later lines of the files are cut off and
    TensorBoard's later points purged: they belong to steps that are done again.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        total_steps: int,
        samples_per_step: int,
        log_every: int,
        resume_step: int = 0,
        *,
        world_size: int = 1,
        facts: Mapping[str, Any] | None = None,
        recipe: str = "",
        changed: Mapping[str, tuple[Any, Any]] | None = None,
        console: Console | None = None,
    ) -> None:
        """`facts`: what else environment.json shall hold. `recipe`: what config.yaml shall; `changed`: its fields that
        are not those of the checkpoint that the run goes on from, with both values."""
        self.total_steps, self.samples_per_step, self.log_every = total_steps, samples_per_step, log_every
        self.world_size = world_size
        self.meter = ThroughputMeter()
        self.lost = Lost()
        self._metrics: BinaryIO | None = None
        if rank != 0:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        lost = cut_metrics(run_dir / "metrics.jsonl", resume_step)
        if resume_step < total_steps or not (run_dir / "config.yaml").exists():
            # What is there already is of the steps that were made: a run that has ended is left as it is.
            write_text(run_dir / "config.yaml", recipe)
            record = {**environment(), "world_size": world_size, **(facts or {})}
            write_json(run_dir / "environment.json", record)
            self.lost = note_start(run_dir, resume_step, record, changed or {}, lost).lost
        else:
            self.lost = lost_so_far(run_dir)
        self._evaluations = run_dir / "evaluations.jsonl"
        cut_metrics(self._evaluations, resume_step)
        # Without a buffer: what could not be written must not be tried again when the file is closed.
        self._metrics = open(run_dir / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._tensorboard = _tensorboard(run_dir / "tensorboard", resume_step)
        self._console = ConsoleProgress(total_steps, log_every, resume_step, console)

    def log_step(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Record finished step `step` (the first is 1).

        `metrics` needs loss, step_time and data_time (seconds); logit_scale
        (1/tau), lr, grad_norm, batch_digest, `normalizer/...` as there are. Added here: step, samples_seen,
        samples_per_second and samples_per_second_per_gpu (moving window), peak_memory_bytes.
        """
        if self._metrics is None:
            return
        self.meter.update(self.samples_per_step, float(metrics["step_time"]), float(metrics["data_time"]))
        record: dict[str, Any] = {
            "step": step,
            "samples_seen": step * self.samples_per_step,
            **metrics,
            "samples_per_second": self.meter.samples_per_second,
            "samples_per_second_per_gpu": self.meter.samples_per_second / self.world_size,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        append_whole(self._metrics, json.dumps(json_ready(record), allow_nan=False).encode() + b"\n")
        if step % self.log_every == 0 or step == self.total_steps:
            self.log_scalars(step, {key: value for key, value in record.items() if key != "step"})
        self._console.show(step, record, self.meter)

    def log_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among `values` to TensorBoard; a name without a folder goes under `train/`."""
        if self._metrics is None:
            return
        with naming(self._tensorboard.log_dir):
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(name if "/" in name else f"train/{name}", value, step)
            # Flushed each time, so that a job killed at its time limit keeps its curves.
            self._tensorboard.flush()

    def log_tree(self, step: int, name: str, tree: Mapping[str, Any]) -> None:
        """The numbers of a nested dict as scalars called by their path below `name`."""
        for key, value in tree.items():
            if isinstance(value, Mapping):
                self.log_tree(step, f"{name}/{key}", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                self.log_scalars(step, {f"{name}/{key}": float(value)})

    def log_evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """Record the scores after `step`, by set, in RUN/evaluations.jsonl and TensorBoard; none leave no trace."""
        if self._metrics is None or not scores:
            return
        self.log_tree(step, "eval", scores)
        record = {"step": step, "samples_seen": step * self.samples_per_step, "evaluation": scores}
        cut_metrics(self._evaluations, step - 1)  # a run that had ended evaluates again when it is called again
        with naming(self._evaluations), open(self._evaluations, "a", encoding="utf-8") as file:
            file.write(json.dumps(json_ready(record), allow_nan=False) + "\n")

    def has_evaluation(self, step: int) -> bool:
        """Whether the scores after `step` are recorded; asked on rank 0."""
        if self._metrics is None or not self._evaluations.exists():
            return False
        return any(json.loads(line)["step"] == step for line in self._evaluations.read_text("utf-8").splitlines())

    def message(self, text: str) -> None:
        """Print one line on the console."""
        if self._metrics is not None:
            self._console.message(text)

    def close(self) -> None:
        """Flush and close everything; further calls do nothing."""
        if self._metrics is None:
            return
        metrics, self._metrics = self._metrics, None
        with metrics, naming(self._tensorboard.log_dir):
            self._console.close()
            self._tensorboard.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_metrics(path: Path, last_step: int) -> tuple[int, float]:
    """Drop the lines of `path` after `last_step`, and any that a kill left unfinished, in one replacement.

    Returns how many were after it, and the seconds that their steps took.
    """
    num_lost, seconds_lost = 0, 0.0
    if not path.exists():
        return num_lost, seconds_lost
    num_damaged = 0
    with open(path, encoding="utf-8", errors="replace") as source, atomic_file(path) as target:
        for line in source:
            try:
                record = json.loads(line)
                keep = record["step"] <= last_step and line.endswith("\n")
                if not keep:
                    num_lost, seconds_lost = num_lost + 1, seconds_lost + record.get("step_time", 0.0)
            except (ValueError, TypeError, KeyError):
                keep, num_damaged = False, num_damaged + 1
            if keep:
                target.write(line.encode("utf-8"))
    if num_damaged:
        log.warning("%s: dropped %d unreadable lines (a run was killed while writing)", path, num_damaged)
    return num_lost, seconds_lost


def _tensorboard(folder: Path, resume_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # 1 s to import, and only rank 0 needs it

    # Also from the start: a run that was killed before its first checkpoint has left points.
    return SummaryWriter(str(folder), purge_step=resume_step + 1)
