"""What is reproduced: one YAML file each in `experiments/`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import yaml

from neuclip_scale.config import ConfigError, ObjectiveName, parse

PAPER = "NeuCLIP, arXiv 2511.08417"
COLUMNS = ("cc3m", "cc12m", "dfn14m", "dfn192m", "dfn1b")
"""Experiments of the paper's table, in its order."""


@dataclass(frozen=True, kw_only=True)
class ListSource:
    """Where the published list comes from."""

    kind: Literal["demo", "hub", "file"]
    """demo: made of the demo's pictures; hub: a data set on the Hugging Face hub; file: what --list names."""
    repository: str = ""
    """On the hub."""
    files: str = "*.parquet"
    """What of it, as a pattern."""
    how: str = ""
    """Where a person gets the list."""
    limit: int = 0
    """Pairs of the demo's that are listed; 0 takes all."""


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """img2dataset's options; those of DataComp unless an experiment says otherwise."""

    image_size: int = 512
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = "keep_ratio_largest"
    only_if_bigger: bool = True
    shard_size: int = 10_000
    """Samples of a shard."""
    retries: int = 2
    timeout: int = 10
    """Seconds."""
    processes: int = 16
    threads: int = 128
    blur_faces: bool = False
    """Blur the boxes of the column face_bboxes, as DataComp did."""


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """A published number of one method on a filtered pool."""

    pairs: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was published of this experiment, with where it stands."""

    source: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    """Method -> DataComp's average over 38 tasks, in points."""
    num_seeds: int = 0
    listed: int = 0
    """Pairs on the list."""
    pairs: int = 0
    """Pairs that were trained on."""
    settings: dict[str, Any] = field(default_factory=dict)
    """section.field of the recipe -> what was published for it. Those of the temperature and of objectives are
    NeuCLIP's and FastCLIP's alone."""
    filters: dict[str, FilterResult] = field(default_factory=dict)
    """Filter with its options -> what was published for it, where the numbers above are of no filter."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One reproduction, from its list to its report."""

    name: str
    title: str
    recipe: str
    list: ListSource
    download: DownloadSettings = field(default_factory=DownloadSettings)
    filter: str = "no_filter"
    """`neuclip subset`'s name of the filter that is applied unless --filter says otherwise."""
    filter_options: tuple[str, ...] = ()
    """Its further arguments."""
    shard_size: int = 10_000
    """Samples of a training shard."""
    suite: Literal["sets", "datacomp"] = "datacomp"
    methods: tuple[ObjectiveName, ...] = ("openclip", "fastclip-v3", "siglip", "amorlip", "neuclip")
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: tuple[str, ...] = ()
    """section.field=value of all runs."""
    method_overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Those of one method's."""
    jobs: int = 1
    """Runs side by side on one machine."""
    nodes: int = 1
    """Machines of a run on a cluster."""
    gpus_per_node: int = 8
    """0: it runs on processors."""
    minutes_per_run: float = 0.0
    """Of one run on one core, measured; for experiments without GPUs."""
    published: Published = field(default_factory=Published)


def published_of(experiment: Experiment) -> Published:
    """What was published of this experiment with the filter that it has; without scores where nothing was."""
    packaged, known = load_experiment(experiment.name), experiment.published
    if (experiment.filter, experiment.filter_options) == (packaged.filter, packaged.filter_options):
        return known
    found = known.filters.get(" ".join((experiment.filter, *experiment.filter_options)))
    if found is None:
        return dataclasses.replace(known, scores={}, pairs=0)
    return dataclasses.replace(known, scores=found.scores, pairs=found.pairs)


def experiment_names() -> list[str]:
    """The packaged experiments."""
    folder = resources.files("neuclip_scale") / "reproduce" / "experiments"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def load_experiment(name: str) -> Experiment:
    """A packaged experiment; raises `ConfigError` for a name that is none."""
    if name not in experiment_names():
        raise ConfigError("EXPERIMENT", name, "there is no such experiment", f"Known: {', '.join(experiment_names())}.")
    text = (resources.files("neuclip_scale") / "reproduce" / "experiments" / f"{name}.yaml").read_text("utf-8")
    return parse(Experiment, {"name": name, **yaml.safe_load(text)})


def changed(experiment: Experiment, **values: object) -> Experiment:
    """`experiment` with those of `values` that are not None."""
    return dataclasses.replace(experiment, **{key: value for key, value in values.items() if value is not None})  # type: ignore[arg-type]
