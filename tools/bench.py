"""Measure what costs time or memory, side by side in one run with what people use today.

    python tools/bench.py SECTION [options] [--json RESULT]     one section; --help lists its options
    python tools/bench.py small                                 all of them in a form that takes a minute, for a look
    python tools/bench.py gpu --output FOLDER                   all that a GPU is measured by, one after the other
    python tools/bench.py report RESULT [--plot FIGURE]         a result as Markdown tables, and drawn

Sections: `loss` contrastive losses beside open_clip's, and how they grow with B; `gradcache` what gradient caching
costs; `step` a training step beside open_clip's trainer; `npn` the NPN's share of an iteration, and how to spread it
over ranks; `checkpoint` writing and reading beside torch.save; `loader` pictures per second of one core; `reshard`
beside a tarfile filter, webdataset, a header walk and cp; `audit` lists of growing length; `subset` DataComp's filters
over a pool's metadata; `kernels` the losses on a GPU, by Triton, torch and open_clip; `layers` the towers' layers that
have kernels of their own, by Triton and torch; `startup` CPU time until something happens. Each is a module
tools/bench_SECTION.py.

A measurement is a process of its own, and contenders run by turns, so that drift of the machine falls on all. Times
on a CPU are for ratios only; of what computes they are the time that the process ran, of what writes the clock's.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import bench_audit
import bench_checkpoint
import bench_everything_gpu
import bench_gradcache
import bench_kernels
import bench_layers
import bench_loader
import bench_loss
import bench_npn
import bench_report
import bench_reshard
import bench_startup
import bench_step
import bench_subset
import tyro


def _machine() -> dict[str, str]:
    from importlib.metadata import version

    import psutil

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {
        "cpu": f"{psutil.cpu_count()} cores of {cpu}, {memory}",
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {version('torch')}",
        "date": date.today().isoformat(),
    }


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Section(NamedTuple):
    """One comparison: its options, what measures them and what prints the result."""

    options: type
    measure: Callable[[Any], dict[str, Any]]
    show: Callable[[Any, dict[str, Any]], None]
    small: tuple[str, ...]
    """Arguments with which it takes seconds: to see that it works and what it tells, not for figures."""
    check: Callable[[Any], None] = lambda options: None
    """Raises SystemExit, which names option, value and remedy, for what could not be measured, or not under its name.
    """


SECTIONS = {
    "loss": Section(
        bench_loss.Loss, bench_loss.measure, bench_loss.show,
        ("--batch-size", "1024", "--embed-dim", "64", "--repeats", "1", "--contenders", bench_loss.CLIP, "openclip"),
        bench_loss.check,
    ),
    "gradcache": Section(
        bench_gradcache.GradCache, bench_gradcache.measure, bench_gradcache.show,
        ("--preset", "toy", "--batch-size", "32", "--micro-batch-size", "8", "--repeats", "1", "--contenders",
         bench_gradcache.PEER, bench_gradcache.OURS),
        bench_gradcache.check,
    ),
    "step": Section(
        bench_step.Step, bench_step.measure, bench_step.show,
        ("--preset", "toy", "--batch-size", "16", "--micro-batches", "2", "--steps", "1", "--repeats", "1",
         "--caption-tokens", "8", "--contenders", bench_step.PEER_PARTS, bench_step.OURS_PARTS),
        bench_step.check,
    ),
    "loader": Section(
        bench_loader.Loader, bench_loader.measure, bench_loader.show,
        ("--num-pictures", "64", "--batch-size", "8", "--num-batches", "3", "--repeats", "1", "--contenders",
         bench_loader.PEER, "ours", bench_loader.BOUND),
        bench_loader.check,
    ),
    "npn": Section(
        bench_npn.Npn, bench_npn.measure, bench_npn.show,
        ("--preset", "toy", "--batch-size", "128", "--num-prototypes", "128", "--repeats", "1"),
        bench_npn.check,
    ),
    "checkpoint": Section(
        bench_checkpoint.Checkpoint, bench_checkpoint.measure, bench_checkpoint.show,
        ("--mebibytes", "16", "--repeats", "1", "--contenders", bench_checkpoint.PEER, bench_checkpoint.BACKGROUND),
        bench_checkpoint.check,
    ),
    "reshard": Section(
        bench_reshard.Reshard, bench_reshard.measure, bench_reshard.show,
        ("--samples", "300", "--workers", "2", "--repeats", "1"),
        bench_reshard.check,
    ),
    "audit": Section(
        bench_audit.Audit, bench_audit.measure, bench_audit.show,
        ("--rows", "2000"),
    ),
    "kernels": Section(
        bench_kernels.Kernels, bench_kernels.measure, bench_kernels.show,
        ("--batch-size", "4096", "--repeats", "1"),
        bench_kernels.check,
    ),
    "layers": Section(
        bench_layers.Layers, bench_layers.measure, bench_layers.show,
        ("--batch-size", "64", "--repeats", "1"),
        bench_layers.check,
    ),
    "subset": Section(
        bench_subset.Subset, bench_subset.measure, bench_subset.show,
        ("--rows", "2000"),
    ),
    "startup": Section(
        bench_startup.Startup, bench_startup.measure, bench_startup.show,
        ("--repeats", "1", "--contenders", bench_startup.HELP, bench_startup.PACKAGE),
        bench_startup.check,
    ),
}  # fmt: skip


def run(name: str, arguments: Sequence[str]) -> None:
    """Measure one section, write it where --json says and show it."""
    section = SECTIONS[name]
    options = tyro.cli(section.options, args=arguments, prog=f"bench.py {name}")
    check(section, options)
    result = {"options": asdict(options), "machine": _machine(), "commit": _commit(), **section.measure(options)}
    write(result, options.json)
    section.show(options, result)


def check(section: Section, options: Any) -> None:
    """Raise SystemExit before anything is measured where the options would lose it, or give it another's name."""
    for field in POSITIVE:
        if getattr(options, field, 1) < 1:
            value = getattr(options, field)
            raise SystemExit(f"--{field.replace('_', '-')} {value}: nothing would be measured. Give 1 or more.")
    section.check(options)
    if options.json:
        _check_writable(Path(options.json))


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        reason = f"the result could not be written there ({error.strerror})"
        raise SystemExit(f"--json {path}: {reason}. Name a file in a folder that is yours.") from error


POSITIVE = ("repeats", "steps", "calls", "threads", "batch_size", "num_batches", "num_pictures")
"""Options of several sections that count something; each needs at least one."""


def main() -> int:
    """Run the chosen section, or all of them in small."""
    name, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if name == "small" and not arguments:
        for each, section in SECTIONS.items():
            print(f"\n== {each} {' '.join(section.small)}")
            run(each, section.small)
    elif name == "gpu":
        return bench_everything_gpu.run(tyro.cli(bench_everything_gpu.Everything, args=arguments, prog="bench.py gpu"))
    elif name == "report":
        bench_report.report(tyro.cli(bench_report.Report, args=arguments, prog="bench.py report"))
    elif name in SECTIONS:
        run(name, arguments)
    else:
        print(__doc__)
        return 0 if name in ("-h", "--help") else 2
    return 0


def write(result: dict[str, Any], path: str) -> None:
    """Write `result` to `path`, if one was given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
