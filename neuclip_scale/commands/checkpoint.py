"""`neuclip checkpoint inspect | convert`: what a checkpoint holds, and its tensors for other tools."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from neuclip_scale.files import is_occupied, write_json

USAGE = """usage: neuclip checkpoint inspect CHECKPOINT [--json FILE]
       neuclip checkpoint convert CHECKPOINT --to dcp|safetensors --output DIR

inspect  verify every byte and list what is there: step, model, optimizer state, normalizers, data position
convert  write parameters and optimizer state for other tools (torch.distributed.checkpoint, safetensors)
CHECKPOINT is a run folder (its newest) or RUN/checkpoints/step_N. `neuclip train` needs no conversion to go on with
other engines or another number of ranks.
"""


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Verify a checkpoint and list what it holds."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run folder or a checkpoint folder."""
    json: Path | None = None
    """Also write the list to this file."""


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Write a checkpoint's parameters and optimizer state in another form."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run folder or a checkpoint folder."""
    to: Literal["dcp", "safetensors"]
    """dcp: a folder of torch.distributed.checkpoint. safetensors: one file. Tensors are called NAME/value,
    NAME/exp_avg, NAME/exp_avg_sq, NAME/step, and NAME/ema where there is an average."""
    output: Path
    """Folder to write; it must not hold anything yet."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, 1 for a checkpoint that is not intact, 2 for bad usage."""
    commands: dict[str, tuple[Callable[[Any], int], type]] = {
        "inspect": (_inspect, InspectArguments),
        "convert": (_convert, ConvertArguments),
    }
    if not argv or argv[0] not in commands:
        asked = argv[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    run, kind = commands[argv[0]]
    arguments: Any = tyro.cli(kind, args=argv[1:], prog=f"neuclip checkpoint {argv[0]}")
    from neuclip_scale.checkpoint import CheckpointError

    try:
        return run(arguments)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _inspect(arguments: InspectArguments) -> int:
    from neuclip_scale.checkpoint import describe, find_checkpoint

    path = find_checkpoint(arguments.checkpoint)
    found = describe(path)
    table = Table(show_header=False, title=f"{path}: intact", title_justify="left")
    for key, value in found.items():
        table.add_row(key.replace("_", " "), _told(value))
    Console(highlight=False, markup=False, emoji=False).print(table)
    if arguments.json:
        write_json(arguments.json, {"path": str(path), **found})
    return 0


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_told(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _convert(arguments: ConvertArguments) -> int:
    from neuclip_scale.checkpoint import convert, find_checkpoint

    if is_occupied(arguments.output):
        print(f"error: --output {arguments.output}: not empty, or no folder. Give a new folder.", file=sys.stderr)
        return 2
    print(f"wrote {convert(find_checkpoint(arguments.checkpoint), arguments.to, arguments.output)}")
    return 0
