"""`neuclip reproduce EXPERIMENT`: from a published list to a report beside the published numbers."""

from __future__ import annotations

import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from neuclip_scale.config import ConfigError, ObjectiveName
from neuclip_scale.files import write_json
from neuclip_scale.reproduce.building import build_stages, chosen
from neuclip_scale.reproduce.costs import estimate
from neuclip_scale.reproduce.errors import TrainingsFailedError
from neuclip_scale.reproduce.experiment import changed, experiment_names, load_experiment
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.running import Runner
from neuclip_scale.reproduce.stages import Stage
from neuclip_scale.reproduce.training import train_arguments
from neuclip_scale.reshard.workers import available_cores


@dataclass(frozen=True, kw_only=True)
class ReproduceArguments:
    """Reproduce an experiment: list, download, audit, subset, reshard, index, train, evaluate, report. What is done is
    kept: the same command goes on where it stopped. Exit status: 0 done, 1 a stage failed, 2 bad usage.
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """demo, demo-small; small, medium, large, xlarge (DataComp's scales); cc3m, cc12m, dfn14m, dfn192m, dfn1b (the
    paper's sets)."""
    output: Path | None = None
    """Folder of everything; runs/reproduce-EXPERIMENT by default."""
    list: str = ""
    """The published list (parquet or .tsv): for the paper's sets, which cannot be fetched, or instead of a fetch."""
    demo_data: Path = Path("demo-data")
    """Of the demos: what `neuclip demo-data` wrote; made where it is not there."""
    evaluation: Path | None = None
    """Folder with DataComp's evaluation sets; without it they are fetched from the hub."""
    methods: tuple[ObjectiveName, ...] | None = None
    """Instead of the experiment's; the first is what the others are compared with."""
    seeds: tuple[int, ...] | None = None
    """Instead of the experiment's."""
    filter: str | None = None
    """Instead of the experiment's filter: a name of `neuclip subset`, as no_filter."""
    filter_options: str | None = None
    """Further arguments of `neuclip subset` for it, in one: --filter-options="--arch l14 --fraction 0.3"."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE"), tyro.conf.UseAppendAction] = ()
    """Overrides of the recipe, for all runs. (repeatable)"""
    launcher: str = ""
    """What starts a training here, as "torchrun --no-python --nproc-per-node 8"."""
    jobs: int | None = None
    """Trainings side by side on this machine."""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 0
    """Processes that read and write shards; 0 takes every core."""
    only: tuple[str, ...] = ()
    """Do these stages alone: names (train/neuclip-seed0) or groups (train)."""
    until: str = ""
    """Stop after this stage or group."""
    dry_run: bool = False
    """Print what would be done, what is done already, and what it will take."""
    nodes: int | None = None
    """Machines of a training on a cluster, instead of the experiment's."""
    gpus_per_node: int | None = None
    """GPUs of each, 8 by default; 0 trains on processors."""
    gpu: Literal["h100", "h200", "a100", "a100-80", "a100-40"] = "h100"
    """For the estimate of --dry-run."""
    price: float = 0.0
    """Of a device for an hour, for the estimate and the report."""
    show: Literal["", "jobs", "train"] = ""
    """What slurm/reproduce.sh asks: what is to be done, in lines of NAME, AFTER,..., KIND, NODES, GPUS between tabs; or
    the arguments of the training that --only names, one a line."""
    json: Path | None = None
    """Also write report.json to this file."""


def main(argv: list[str]) -> int:
    """Run the command; returns 0, raises `ReproduceError` where a stage failed and `ConfigError` for bad usage."""
    arguments = tyro.cli(ReproduceArguments, args=argv, prog="neuclip reproduce")
    request = _request(arguments)
    stages = build_stages(request)
    names = chosen(stages, arguments.only, arguments.until)
    if arguments.json and ("report" not in names or arguments.show or arguments.dry_run):
        raise ConfigError("--json", arguments.json, "no report is made by this", "Leave it out.")
    runner = Runner(stages, request.places, lambda text: print(text, file=sys.stderr, flush=True))
    if arguments.show:
        return _show(arguments, request, [runner.stages[name] for name in names], runner)
    if arguments.dry_run:
        _print_plan(request, runner, names, arguments.gpu)
        return 0
    signal.signal(signal.SIGTERM, _end)
    failed: TrainingsFailedError | None = None
    try:
        runner.run(names, request.experiment.jobs)
    except TrainingsFailedError as error:
        failed = error
    if "report" in names:
        _tell_report(request, arguments.json)
    if failed:
        raise failed
    return 0


def _end(number: int, _: object) -> None:
    """End what runs: trainings save what they have."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.terminate()
    psutil.wait_procs(children, timeout=600)  # whoever waits for one of them would else kill it now
    raise SystemExit(128 + number)


def _request(arguments: ReproduceArguments) -> Request:
    if arguments.experiment not in experiment_names():
        known = ", ".join(experiment_names())
        raise ConfigError("EXPERIMENT", arguments.experiment, "there is no such experiment", f"Known: {known}.")
    options = None if arguments.filter_options is None else tuple(shlex.split(arguments.filter_options))
    if arguments.filter is not None and options is None:
        options = ()
    experiment = changed(
        load_experiment(arguments.experiment),
        methods=arguments.methods,
        seeds=arguments.seeds,
        filter=arguments.filter,
        filter_options=options,
        jobs=arguments.jobs,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
    )
    return Request(
        experiment=experiment,
        output=arguments.output or Path("runs") / f"reproduce-{experiment.name}",
        list=arguments.list,
        demo_data=arguments.demo_data,
        evaluation=arguments.evaluation,
        launcher=arguments.launcher,
        num_workers=arguments.num_workers or available_cores(),
        overrides=arguments.set,
        price=arguments.price,
    )


def _show(arguments: ReproduceArguments, request: Request, stages: list[Stage], runner: Runner) -> int:
    experiment = request.experiment
    if arguments.show == "jobs":
        for stage in stages:
            if not runner.is_done(stage, keep=False):
                nodes = experiment.nodes if stage.kind == "train" else 1
                gpus = {"train": experiment.gpus_per_node, "evaluate": min(1, experiment.gpus_per_node)}
                print(stage.name, ",".join(stage.after) or "-", stage.kind, nodes, gpus.get(stage.kind, 0), sep="\t")
        return 0
    labels = [stage.name.partition("/")[2] for stage in stages if stage.kind == "train"]
    if len(labels) != 1:
        raise ConfigError("--only", list(arguments.only), "not one training", "Give --only train/METHOD-seedN.")
    print(*train_arguments(request, labels[0]), sep="\n")
    return 0


def _print_plan(request: Request, runner: Runner, names: list[str], gpu: str) -> None:
    for name in names:
        stage = runner.stages[name]
        print(f"{name}{'  (done)' if runner.is_done(stage, keep=False) else ''}")
        for line in stage.lines:
            print(f"    {line}")
    print()
    for line in estimate(request, gpu).lines:
        print(line)


def _tell_report(request: Request, copy: Path | None) -> None:
    from neuclip_scale.run_folder import read_object

    folder = request.places.report
    if copy:
        write_json(copy, read_object(folder / "report.json"))
    for name in ("index.html", "report.md", "report.json"):
        print(f"  {folder / name}", flush=True)  # before an error, where both go to one file
