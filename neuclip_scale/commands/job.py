"""`neuclip job`: what the scripts in slurm/ ask before, between and after the attempts of a run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from neuclip_scale.commands.numbers import amount, positive
from neuclip_scale.config import ConfigError, Recipe, check_places, check_recipe, load_recipe

EXIT_CODES = """What a script wants is printed on standard output, what people want on standard error.
Exit status: 0 done, 1 failed, 2 bad usage or a recipe that cannot be run."""


def main(argv: list[str]) -> int:
    """Run the command; 0 done, 1 failed, 2 bad usage. Raises `ConfigError` for a recipe that cannot be run."""
    parser = argparse.ArgumentParser("neuclip job", description="Steps of a Slurm job.", epilog=EXIT_CODES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|begin|end|logs")
    check = commands.add_parser("check", help="can a recipe be run on so many ranks? prints its run_dir and data.train")
    check.add_argument("--world-size", type=positive, required=True, help="ranks of the run, one for each GPU")
    check.add_argument("--gpu-memory-gib", type=amount, default=0.0, help="refuse what needs more; 0: any")
    check.add_argument("train", nargs=argparse.REMAINDER, help="RECIPE and overrides, as `neuclip train` takes them")
    begin = commands.add_parser("begin", help="note an attempt; prints go, finished or stop")
    begin.add_argument("--submission", required=True, help="what was submitted as one: a job, or a chain of jobs")
    begin.add_argument("--job", required=True, help="id of this job")
    end = commands.add_parser("end", help="note how it ended; prints finished, again or stop")
    end.add_argument("--status", type=int, required=True, help="exit status of the training")
    end.add_argument("--job", default="", help="what `begin` was given; without it the last attempt is meant")
    for each in (begin, end):
        each.add_argument("run_dir", type=Path)
        each.add_argument("--tries", type=positive, default=3, help="failures without progress before giving up")
    logs = commands.add_parser("logs", help="copy `srun --label`'s output, and append it to one file for each rank")
    logs.add_argument("folder", type=Path)
    logs.add_argument("--header", default="", help="first line of what is appended")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        return _check(arguments.train, arguments.world_size, arguments.gpu_memory_gib)
    if arguments.command == "logs":
        return _split_logs(arguments.folder, arguments.header)
    from neuclip_scale.run_attempts import begin_attempt, end_attempt

    if arguments.command == "begin":
        decision, why = begin_attempt(arguments.run_dir, arguments.submission, arguments.job, arguments.tries)
    else:
        decision, why = end_attempt(arguments.run_dir, arguments.status, arguments.tries, arguments.job)
    print(f"{arguments.run_dir}: {why}.", file=sys.stderr)
    print(decision)
    return 0


def _check(train: list[str], world_size: int, gpu_memory_gib: float) -> int:
    from neuclip_scale.commands.train import read_arguments

    if not train or train[0].startswith("-"):
        print("usage: neuclip job check --world-size N RECIPE [--section.field VALUE ...]", file=sys.stderr)
        return 2
    recipe, _ = read_arguments(train)
    check_places(recipe)
    check_recipe(recipe, world_size)
    _check_start(recipe)
    told = f"{recipe.name}: {recipe.train.global_batch_size} pairs a step over {world_size} ranks"
    if gpu_memory_gib:
        told += f", {_fits(recipe, world_size, gpu_memory_gib):.1f} of {gpu_memory_gib:g} GiB on each"
    print(told, file=sys.stderr)
    print(recipe.run_dir, recipe.data.train, sep="\n")
    return 0


def _check_start(recipe: Recipe) -> None:
    """What would end the run on its nodes, as far as it can be told from here; raises ConfigError."""
    from neuclip_scale.checkpoint import check_compatible
    from neuclip_scale.data.shards import ShardError, expand_source, split_sources, storage
    from neuclip_scale.run_folder import newest_checkpoint

    if recipe.engine.name == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(
            "engine.name", "deepspeed", "DeepSpeed is not installed", "pip install 'neuclip-scale[deepspeed]'"
        )
    run_dir = Path(recipe.run_dir)
    if recipe.resume not in ("auto", "never"):
        problem = "a job that is queued again would begin there once more, and never come further"
        remedy = f"Copy that folder into {run_dir / 'checkpoints'}, without later ones beside it, and leave resume out."
        raise ConfigError("resume", recipe.resume, problem, remedy)
    there = next(path for path in (run_dir, *run_dir.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError("run_dir", recipe.run_dir, f"{there} cannot be written to", "Give another folder.")
    if recipe.resume == "auto" and newest_checkpoint(run_dir) and (run_dir / "config.yaml").is_file():
        try:
            before = load_recipe(str(run_dir / "config.yaml"), {})
        except ConfigError as error:  # of another version; what counts is in the checkpoint
            print(f"warning: {error}", file=sys.stderr)
        else:
            check_compatible(before, recipe)
    try:
        for part in split_sources(recipe.data.train):
            if not storage.is_remote(part) and not Path(part).is_file():
                expand_source(part)
    except ShardError as error:  # which the nodes may have and this machine not
        print(f"warning: data.train: {error}", file=sys.stderr)


def _fits(recipe: Recipe, world_size: int, gpu_memory_gib: float) -> float:
    """GiB that each rank needs; raises ConfigError where there are fewer."""
    from neuclip_scale.planning import plan_memory

    needed = plan_memory(recipe, world_size).device / 2**30
    if needed > gpu_memory_gib:
        raise ConfigError(
            "train.micro_batch_size",
            recipe.train.micro_batch_size,
            f"each rank needs {needed:.1f} GiB, and a GPU has {gpu_memory_gib:g}",
            "Lower it, set model.grad_checkpointing=true, take a higher ZeRO stage, or more nodes (`neuclip plan`).",
        )
    return needed


def _split_logs(folder: Path, header: str) -> int:
    from neuclip_scale.rank_logs import split_logs

    # It ends with its input: the signals that end a job reach it before the ranks have said their last words.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0) as echo:
        split_logs(sys.stdin.buffer, folder, echo, header)
    return 0
