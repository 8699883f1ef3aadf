"""`neuclip COMMAND ...`: finds the command, runs it, and prints errors meant for people in one line.

Exit status: 0 done, 1 failed or found a discrepancy, 2 bad usage or configuration.
"""

from __future__ import annotations

import difflib
import errno
import os
import select
import signal
import sys
from contextlib import suppress
from importlib import import_module

from neuclip_scale import __version__

_OF_A_PLACE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT,
    errno.EFBIG,
)  # fmt: skip
"""Errors that say of a file's place that nothing can be written or read there."""

# name: (module with main(argv) -> int, help in one line); a module is imported only when its command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("neuclip_scale.commands.train", "Train a model from a recipe, or resume a run."),
    "data": ("neuclip_scale.commands.data", "Describe a training set's shards in a manifest, or check one."),
    "plan": ("neuclip_scale.commands.plan", "What a run will hold, send, take and cost, before it is queued."),
    "evaluate": (
        "neuclip_scale.commands.evaluate",
        "Zero-shot accuracy and retrieval of a run or a model.",
    ),
    "export": ("neuclip_scale.commands.export", "Write a run's model for open_clip, transformers or safetensors."),
    "checkpoint": ("neuclip_scale.commands.checkpoint", "Verify and list a checkpoint, or write its tensors anew."),
    "report": ("neuclip_scale.commands.report", "Finished runs side by side: scores, cost, figures."),
    "study": (
        "neuclip_scale.commands.study",
        "Controlled experiments: normalizers against the truth, and methods on equal terms.",
    ),
    "compare": ("neuclip_scale.commands.compare", "Can runs be compared? Recipes, data, scores over seeds, cost."),
    "subset": ("neuclip_scale.commands.subset", "Uids of a pool's samples that pass DataComp's filters, for reshard."),
    "reshard": ("neuclip_scale.commands.reshard", "New shards of chosen samples: copied, verified, resumable."),
    "audit": ("neuclip_scale.commands.audit", "What a download lacks of its list, why, and whether it matters."),
    "reproduce": (
        "neuclip_scale.commands.reproduce",
        "An experiment from its published list to a report beside the published numbers.",
    ),
    "demo-data": (
        "neuclip_scale.commands.demo_data",
        "Build the demo's training shards and evaluation sets.",
    ),
    "status": ("neuclip_scale.commands.status", "Progress and health of a run, from anywhere its folder can be read."),
    "preflight": (
        "neuclip_scale.commands.preflight",
        "Are all nodes of a job fit to train? Names the one that is not.",
    ),
    "job": ("neuclip_scale.commands.job", "What slurm/common.sh asks: check a run, count attempts, split logs."),
    "doctor": ("neuclip_scale.commands.doctor", "Check that this machine can train, and say what to mend."),
}


def main(argv: list[str] | None = None) -> int:
    """Run `neuclip` with `argv` (default: the process's own) and return the exit status."""
    try:
        try:
            return _main(argv)
        finally:
            if sys.stdout is not None:  # as under `>&-`
                sys.stdout.flush()  # at the interpreter's end nobody could tell whose fault it is
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _OF_A_PLACE or error.filename or not _output_fails():
            raise
        _drop_output()
        with suppress(OSError):
            print(f"error: standard output: {error.strerror}. Send it elsewhere, or mend its place.", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """What standard output still holds, or the interpreter would try to write it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_fails() -> bool:
    """Whether nothing can be written to standard output, as on a full disk; costs an empty line."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has left, as `| head` does: not a connection that broke."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


def _main(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"neuclip {__version__}")
        return 0
    if name not in COMMANDS:
        return _unknown(name)
    return _run(COMMANDS[name][0], rest)


def usage() -> str:
    """The text of `neuclip --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: neuclip COMMAND ...",
            "",
            "Train CLIP with the global contrastive loss and a normalizer-prediction network.",
            "",
            "commands:",
            *lines,
            "",
            "`neuclip COMMAND --help` explains a command; `neuclip --version` prints the version.",
        ]
    )


def _unknown(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Commands: {', '.join(COMMANDS)}."
    print(f"error: there is no command {name!r}. {hint}", file=sys.stderr)
    return 2


def _run(module: str, arguments: list[str]) -> int:
    try:
        return int(import_module(module).main(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_A_PLACE and error.filename:
            print(
                f"error: {error.filename}: {error.strerror}. Choose another place, or mend this one.", file=sys.stderr
            )
            return 1
        # An exception class of this package speaks to the user. Any other is a bug: keep its traceback.
        if type(error).__module__.partition(".")[0] != __name__.partition(".")[0]:
            raise
        from neuclip_scale.config import ConfigError

        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else getattr(error, "exit_status", 1)
