"""A stage: what it depends on, what decides its result, and how it is done."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from neuclip_scale.files import json_ready
from neuclip_scale.reproduce.errors import ReproduceError

Kind = Literal["processors", "train", "evaluate", "report"]
NEUCLIP = [sys.executable, "-m", "neuclip_scale"]


@dataclass(frozen=True)
class Command:
    """A program that a stage runs."""

    arguments: tuple[str, ...]
    accepted: tuple[int, ...] = (0,)
    """Exit statuses that are no failure."""
    environment: Mapping[str, str] | None = None
    """Instead of this process's."""

    @property
    def text(self) -> str:
        """As people type it."""
        ours = self.arguments[: len(NEUCLIP)] == tuple(NEUCLIP)
        return shlex.join(("neuclip", *self.arguments[len(NEUCLIP) :]) if ours else self.arguments)

    def run(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Run it, its output appended to `log`; raises `ReproduceError` with its last words where it fails."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as stream:
            stream.write(f"$ {self.text}\n".encode())
            stream.flush()
            try:
                done = subprocess.run(
                    self.arguments, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                    env=environment or self.environment, check=False,
                )  # fmt: skip
            except OSError as error:
                told = f"{self.arguments[0]} cannot be started ({error.strerror}). Install it, or give its whole path."
                raise ReproduceError(told) from error
        if done.returncode not in self.accepted:
            lines = log.read_text("utf-8", errors="replace").strip().splitlines()
            raise ReproduceError(
                f"exit status {done.returncode}, last line: {lines[-1].strip()} (all of it: {log}). Mend the cause and "
                "give the same command again."
            )


def neuclip(*arguments: object, accepted: tuple[int, ...] = (0,)) -> Command:
    """A `neuclip` command of this very installation."""
    return Command((*NEUCLIP, *map(str, arguments)), accepted)


@dataclass(frozen=True)
class Stage:
    """One step, done once."""

    name: str
    after: tuple[str, ...]
    """Stages whose results it uses."""
    settings: dict[str, Any]
    """What decides its result, besides the stages before it."""
    commands: tuple[Command, ...] = ()
    read: Callable[[], dict[str, Any]] = dict
    """What is kept of its result once the commands are done."""
    do: Callable[[Path], None] | None = None
    """Instead of the commands, where a stage is more than programs; gets the log."""
    told: tuple[str, ...] = ()
    """What it does, where the commands do not tell."""
    kind: Kind = "processors"
    was_done: Callable[[], bool] | None = None
    """Whether someone else, as a job of a cluster, has done it."""
    produces: tuple[Path, ...] = ()
    """What must be there for a finished stage to count."""

    def key(self, before: Sequence[str]) -> str:
        """Changes with the settings of this stage and of all before it."""
        text = json.dumps([self.name, json_ready(self.settings), sorted(before)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def lines(self) -> tuple[str, ...]:
        """What it does, for people."""
        return self.told or tuple(command.text for command in self.commands)
