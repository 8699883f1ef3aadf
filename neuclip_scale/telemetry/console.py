"""Progress for people: one live line on a terminal, plain lines in a log file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from neuclip_scale.telemetry.meter import ThroughputMeter, peak_memory_bytes


class ConsoleProgress:
    """Shows the state of a run of `total_steps`.

    On a terminal one line with a bar is redrawn at every step; elsewhere (a Slurm log, a pipe) a plain
    line is printed every `log_every` steps and at the last.
    """

    def __init__(self, total_steps: int, log_every: int, start_step: int = 0, console: Console | None = None) -> None:
        self.total_steps, self.log_every = total_steps, log_every
        # soft_wrap: a log file has no width, and a wrapped line cannot be grepped.
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            self._bar = Progress(BarColumn(bar_width=16), TextColumn("{task.fields[line]}"), console=self.console)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, line="starting")
            self._bar.start()

    def show(self, step: int, metrics: Mapping[str, Any], meter: ThroughputMeter) -> None:
        """Report finished step `step`."""
        if self._bar is not None:
            line = progress_line(step, self.total_steps, metrics, meter)
            self._bar.update(self._task, completed=step, line=line)
        elif step % self.log_every == 0 or step == self.total_steps:
            self.message(progress_line(step, self.total_steps, metrics, meter))

    def message(self, text: str) -> None:
        """Print one line, above the live line if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_line(step: int, total_steps: int, metrics: Mapping[str, Any], meter: ThroughputMeter) -> str:
    """Step, loss, temperature, speed, MFU if known, share of waiting for data, peak memory, time left: one line."""
    parts = [f"step {step}/{total_steps}", f"loss {metrics['loss']:.4f}"]
    if metrics.get("logit_scale"):
        parts.append(f"tau {1.0 / metrics['logit_scale']:.4f}")
    # Of as many steps as the speed.
    mfu = metrics["mfu"] * metrics["step_time"] / meter.step_time if "mfu" in metrics and meter.step_time else 0.0
    parts += [
        f"{_three_digits(meter.samples_per_second)} samples/s",
        *([f"MFU {mfu:.0%}"] if mfu else []),
        f"data wait {meter.data_wait_share:.0%}",
        f"mem {peak_memory_bytes() / 2**30:.1f} GiB",
        f"ETA {duration((total_steps - step) * meter.step_time)}",
    ]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`2d 03h`, `1h 02m`, `3m 20s` or `12s`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
