"""`neuclip train RECIPE [--section.field VALUE ...]`"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path

import tyro

from neuclip_scale.commands.scores import demo_caveat, print_scores
from neuclip_scale.config import ConfigError, Recipe, load_recipe, recipe_names

USAGE = """usage: neuclip train RECIPE --run-dir DIR [--section.field VALUE | section.field=VALUE ...]

RECIPE is a packaged name ({names}) or a YAML file.
`neuclip train RECIPE --help` lists every field with the recipe's value.
One process, or `torchrun --no-python --nproc-per-node N neuclip train ...`, or under srun.
Exit status: 0 finished, 1 failed, 2 bad usage, 75 saved and stopped by SIGTERM or SIGUSR1 (run again to go on).
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or argv[0].startswith("-"):
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(USAGE.format(names=", ".join(recipe_names())), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    config, json_path = read_arguments(argv)
    if json_path:  # now, and not after days of training
        if Path(json_path).is_dir():
            raise ConfigError("--json", json_path, "is a folder", "Give a file.")
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
    use_huge_pages()
    # torch and the models take seconds to import: not before the arguments are known to be good.
    from neuclip_scale import distributed, files
    from neuclip_scale.run_state import EXIT_STOPPED
    from neuclip_scale.trainer import Trainer

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        summary = Trainer(config).fit()
        if distributed.is_main():
            if summary["evaluation"]:
                print_scores(summary["evaluation"], demo_caveat(Path(config.evaluation.data)))
            print(f"run folder: {config.run_dir}   TensorBoard: tensorboard --logdir {config.run_dir}/tensorboard")
            if json_path:
                files.write_json(Path(json_path), summary)
        distributed.barrier()  # a launcher ends the other ranks as soon as one leaves with EXIT_STOPPED
    finally:
        distributed.shutdown()
    status = 0 if summary["status"] == "finished" else EXIT_STOPPED
    distributed.end_rank(status)
    return status


def use_huge_pages() -> None:
    """Let torch ask the kernel for pages of 2 MiB for large tensors: on a CPU, most of the time that it takes to make
    floats of a batch of pictures goes to the first touch of its pages. Before torch is imported; what is set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Train(Recipe):
    """Train a CLIP model; every field of the recipe is an option, its default is the recipe's value."""

    json: str = ""
    """Also write the run's summary to this file."""


def read_arguments(argv: list[str]) -> tuple[Recipe, str]:
    """RECIPE and overrides -> (Recipe, --json's path); exits with 2 on bad usage, as argparse does.

    `section.field=value` is YAML, as in a recipe; `--section.field VALUE` wins over it. Raises `ConfigError`.
    """
    overrides, options = split_arguments(argv[1:])
    recipe = load_recipe(argv[0], overrides)
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    parsed = tyro.cli(
        _Train, default=_Train(**fields), args=options, prog=f"neuclip train {argv[0]}",
        config=(tyro.conf.FlagConversionOff,),
    )  # fmt: skip
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Recipe)}
    return Recipe(**values), parsed.json


def split_arguments(tokens: list[str], flags: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """(`section.field=value` overrides, everything else); the token after `--option` is its value, whatever it is, but
    for `flags`, which have none.
    """
    overrides: list[str] = []
    options: list[str] = []
    is_value = False
    for token in tokens:
        is_override = not is_value and re.match(r"[a-z_]+(\.[a-z_]+)*=", token)
        (overrides if is_override else options).append(token)
        is_value = token.startswith("--") and "=" not in token and token not in flags
    return overrides, options
