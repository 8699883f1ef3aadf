"""All stages of a reproduction, in the order in which they are done."""

from __future__ import annotations

from neuclip_scale.config import ConfigError
from neuclip_scale.reproduce.fetching import download_stage
from neuclip_scale.reproduce.listing import list_stage
from neuclip_scale.reproduce.preparing import audit_stage, index_stage, reshard_stage, subset_stage
from neuclip_scale.reproduce.reporting import report_stage
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.stages import Stage
from neuclip_scale.reproduce.training import evaluate_stage, train_stage

PREPARING = (list_stage, subset_stage, download_stage, audit_stage, reshard_stage, index_stage)


def build_stages(request: Request) -> list[Stage]:
    """Every stage after those it uses; raises `ConfigError` for a request or a recipe that cannot be."""
    request.check()
    prepared = [make(request) for make in PREPARING]
    trained = [train_stage(request, label) for label in request.labels]
    evaluated = [evaluate_stage(request, label) for label in request.labels]
    stages = [*prepared, *trained, *evaluated]
    return [*stages, report_stage(request, stages)]


def chosen(stages: list[Stage], only: tuple[str, ...], until: str) -> list[str]:
    """Names of the stages that were asked for: `only` by name or by what stands before the slash, or up to `until`."""
    if only and until:
        raise ConfigError("--until", until, "--only names the stages already", "Give one of the two.")
    names = [stage.name for stage in stages]
    groups = list(dict.fromkeys(name.partition("/")[0] for name in names))
    for field, values in (("--only", only), ("--until", (until,) if until else ())):
        for value in values:
            if value not in names and value not in groups:
                raise ConfigError(field, value, "there is no such stage", f"Stages: {', '.join(groups)}.")
    if only:
        return [name for name in names if name in only or name.partition("/")[0] in only]
    if until:
        last = max(place for place, name in enumerate(names) if until in (name, name.partition("/")[0]))
        return names[: last + 1]
    return names
