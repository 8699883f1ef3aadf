"""`neuclip status RUN ...`: progress and health of runs, from their folders alone."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from neuclip_scale.files import write_json
from neuclip_scale.run_attempts import AttemptsError
from neuclip_scale.run_status import RECENT, RunStatus, StatusError, read_status
from neuclip_scale.telemetry.console import duration

BAR = 40


def main(argv: list[str]) -> int:
    """Run the command; 0, or 1 if a run failed, is stale or has silent ranks or a folder has none, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        "neuclip status",
        description="Progress and health of runs. Reads their folders, so it works wherever these can be read.",
        epilog="Exit status: 0, 1 if a run failed, is stale or has silent ranks or a folder holds none, 2 bad usage.",
    )
    parser.add_argument("run", nargs="+", type=Path, help="a run folder")
    parser.add_argument("--json", metavar="PATH", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args(argv)
    for path in arguments.run:
        if not path.is_dir():
            parser.error(f"RUN {path}: there is no such folder.")
    found: list[RunStatus] = []
    wrong: list[Exception] = []
    for path in arguments.run:
        try:
            found.append(read_status(path))
        except (StatusError, AttemptsError) as error:  # of `runs/*` one may be none: the others are told
            wrong.append(error)
    if found:
        print("\n\n".join(describe(status) for status in found))
    if arguments.json and found:
        documents = [status.document() for status in found]
        write_json(arguments.json, documents[0] if len(arguments.run) == 1 else documents)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return 0 if not wrong and all(status.is_well for status in found) else 1


def describe(status: RunStatus) -> str:
    """Some lines for people."""
    lines = [f"{status.run_dir}: {status.state}; {status.why}"]
    if status.num_steps:
        share = min(1.0, status.step / status.num_steps)
        bar = "#" * int(share * BAR)
        lines.append(f"  [{bar:.<{BAR}}] {share:.1%}  step {status.step:,} of {status.num_steps:,}")
    if status.samples_seen:
        age = duration(status.last_step_seconds)
        lines.append(f"  samples seen {status.samples_seen:,}, {status.num_skipped:,} skipped; last step {age} ago")
        speed = f"{status.samples_per_second:,.0f} samples/s"
        if status.world_size > 1:
            speed += f" ({status.samples_per_second / status.world_size:,.1f} on each of {status.world_size} ranks)"
        mfu = f", MFU {status.mfu:.1%}" if status.mfu else ""
        lines.append(f"  {speed}{mfu}; to go {duration(status.eta_seconds)}")
        lines.append(f"  loss {status.loss:.4f}, mean of the last {RECENT} steps {status.mean_loss:.4f}")
    if status.checkpoint_step:
        lines.append(f"  checkpoint of step {status.checkpoint_step:,}, {duration(status.checkpoint_seconds)} old")
    else:
        lines.append("  no checkpoint yet")
    if status.attempts:
        counts = Counter(attempt["outcome"] for attempt in status.attempts)
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        lines.append(f"  attempts: {len(status.attempts)} ({told})")
    lines += [f"  ! {told}" for told in status.silent]
    lines += [f"  ! stacks of a hang: {path}" for path in status.stacks]
    return "\n".join(lines)
