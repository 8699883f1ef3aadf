"""The report's sections: ours beside the published, the data, the settings, the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from neuclip_scale.config import load_recipe
from neuclip_scale.evaluation.statistics import Estimate, sign_flip_name, smallest_sign_flip_p
from neuclip_scale.reproduce.experiment import COLUMNS, Experiment, load_experiment, published_of
from neuclip_scale.reproduce.results import AVERAGE, Paired, Results, paired
from neuclip_scale.reproduce.training import train_arguments
from neuclip_scale.studies.page import Section

NOT_RUN = "not run"
UNKNOWN = "not known"


def published_section(results: Results) -> Section:
    """Our numbers beside the published ones of this experiment."""
    experiment = results.request.experiment
    known = published_of(experiment)
    if not known.scores:
        what = "this experiment with this filter" if experiment.published.scores else "this experiment"
        text = f"Nothing is published for {what}: its scores compare the methods with one another, here."
        return Section("Ours beside the published", [text])
    rows = []
    for method in dict.fromkeys([*known.scores, *experiment.methods]):
        ours, theirs = results.estimate(method, AVERAGE), known.scores.get(method)
        rows.append(
            [
                method, NOT_RUN if ours is None else points(ours), UNKNOWN if theirs is None else f"{theirs:.2f}",
                _difference(ours, theirs), "0" if ours is None else str(ours.n), str(known.num_seeds),
            ]
        )  # fmt: skip
    lines = [
        f"DataComp's average over 38 tasks, in points. Published: {known.source}.",
        "Intervals: Student's t, 95 %, over our seeds alone; the published means have noise of their own beside it.",
    ]
    lines += [known.note] if known.note else []
    lacking = sorted({task for run in results.runs.values() for task in run.missing})
    if lacking:
        lines.append(f"No average where tasks lack ({len(lacking)}): {', '.join(lacking)}.")
    header = ["method", "ours [95 % interval]", "published", "difference", "our seeds", "published seeds"]
    return Section("Ours beside the published", lines, header, rows)


def all_published_section(results: Results) -> Section:
    """The paper's whole table with what of it was run here."""
    here = results.request.experiment
    sets = {name: load_experiment(name) for name in COLUMNS}
    methods = list(dict.fromkeys(name for each in sets.values() for name in each.published.scores))
    rows = [[method, *(_cell(results, here, each, method) for each in sets.values())] for method in methods]
    line = "Published, and in brackets ours where this reproduction ran it (DataComp's average, in points)."
    return Section("The paper's table", [line], ["method", *sets], rows)


def _cell(results: Results, here: Experiment, column: Experiment, method: str) -> str:
    of_paper = (column.name, column.filter, column.filter_options)  # with another filter it is another experiment
    ours = results.estimate(method, AVERAGE) if (here.name, here.filter, here.filter_options) == of_paper else None
    return f"{column.published.scores[method]:.2f} ({NOT_RUN if ours is None else points(ours)})"


def scores_section(results: Results) -> Section:
    """Every score of every method."""
    methods = results.request.experiment.methods
    rows = []
    for score in results.scores:
        found = [results.estimate(method, score) for method in methods]
        rows.append([score, *(NOT_RUN if each is None else points(each) for each in found)])
    lines = ["In points: mean over seeds [Student's 95 % interval] (seeds)."] if rows else ["No run was evaluated."]
    return Section("Scores", lines, ["", *methods] if rows else [], rows)


def differences_section(results: Results) -> Section:
    """Each method less the first, seed by seed."""
    reference, *others = results.request.experiment.methods
    rows, lines = [], []
    sizes: set[int] = set()
    for method in others:
        found = paired(results, method, reference)
        sizes |= {pair.estimate.n for pair in found}
        rows += [[f"{method} - {reference}", pair.score, *_paired(pair)] for pair in found]
        if not found:
            lines.append(f"{method}: fewer than two seeds in common with {reference}, so no test.")
    if rows:
        least = ", ".join(f"below {smallest_sign_flip_p(n):.2g} with {n} common seeds" for n in sorted(sizes))
        lines.append(
            f"Paired by seed; p by the {sign_flip_name(sizes)}, Holm's correction over the scores of a pair. "
            f"No p can be {least}: read the intervals."
        )
    header = ["methods", "score", "difference [95 % interval]", "p", "p, Holm"] if rows else []
    return Section(f"Differences from {reference}", lines, header, rows)


def _paired(pair: Paired) -> list[str]:
    return [points(pair.estimate, sign=True, with_n=False), f"{pair.p:.2g}", f"{pair.p_holm:.2g}"]


def data_section(results: Results) -> Section:
    """From the list to what was trained on, with digests."""
    known = published_of(results.request.experiment)
    steps = (
        ("on the list", "list", "listed", known.listed), ("tried", "download", "tried", 0),
        ("downloaded", "download", "downloaded", 0), ("failed to download", "download", "failed_to_download", 0),
        ("failed to be decoded or resized", "download", "failed_to_resize", 0), ("usable", "audit", "usable", 0),
        ("missing", "audit", "missing", 0), ("kept by the filter", "subset", "kept", 0),
        ("in the training shards", "index", "usable", known.pairs),
        ("of these held against a published hash", "index", "checked", 0),
        ("of these with other bytes than were published", "index", "changed", 0),
    )  # fmt: skip
    rows = []
    for what, stage, name, theirs in steps:
        value = results.of(stage).get(name)
        if value is None and stage in results.records:
            continue
        share = f"{value / theirs:.1%}" if value is not None and theirs else ""
        rows.append([what, NOT_RUN if value is None else f"{value:,}", f"{theirs:,}" if theirs else "", share])
    lines = [
        f"Filter: {results.request.experiment.filter} {' '.join(results.request.experiment.filter_options)}".strip()
    ]
    for stage, what in (("audit", "the download"), ("index", "the training shards, which every run required")):
        if found := results.of(stage):
            lines.append(f"Audit of {what}: digest {found['digest']}, fingerprint {found['fingerprint']}.")
    reasons = results.of("audit").get("reasons") or {}
    if reasons:
        lines.append(f"Why pairs are missing: {', '.join(f'{name} {n:,}' for name, n in reasons.items())}.")
    epochs = sorted({round(run.summary["epochs"], 3) for run in results.runs.values() if run.summary})
    if epochs:
        lines.append(f"Passes over these pairs: {', '.join(f'{each:g}' for each in epochs)}.")
    return Section("Data", lines, ["pairs", "here", "published", "of the published"], rows)


def settings_section(results: Results) -> Section:
    """Where the runs' recipes are not what was published."""
    request = results.request
    known = request.experiment.published.settings
    rows = []
    for label, (method, seed) in request.labels.items():
        if seed != request.experiment.seeds[0]:
            continue
        arguments = train_arguments(request, label)
        recipe = load_recipe(arguments[0], arguments[1:])
        for name, theirs in known.items():
            section, _, key = name.partition(".")
            ours = getattr(getattr(recipe, section), key)
            if ours != theirs and (method in OWN_TEMPERATURE or not name.startswith(NEUCLIPS)):
                rows.append([method, name, str(ours), str(theirs)])
    if not known:
        lines = ["No settings are published for this experiment."]
    elif rows:
        lines = ["These settings are not the published ones:"]
    else:
        lines = [f"All {len(known)} published settings are as published: {', '.join(known)}."]
    packaged = load_experiment(request.experiment.name)
    if (request.experiment.filter, request.experiment.filter_options) != (packaged.filter, packaged.filter_options):
        lines.append(
            f"The filter is not the experiment's, {packaged.filter} {' '.join(packaged.filter_options)}".strip()
        )
    lines.append(
        "The recipe's other fields, and what other methods than NeuCLIP and FastCLIP do with the temperature, are "
        f"choices of this project (`neuclip train {request.experiment.recipe} --help`)."
    )
    if request.overrides:
        lines.append(f"Overridden here: {' '.join(request.overrides)}.")
    return Section("Settings", lines, ["method", "field", "here", "published"] if rows else [], rows)


OWN_TEMPERATURE = ("neuclip", "fastclip-v3")
NEUCLIPS = ("objective.", "optim.temperature_")
"""Published settings that say nothing of the other methods."""


def cost_section(results: Results, price: float) -> Section:
    """Wall-clock, device-hours, energy and money of the trainings."""
    rows, totals, counted, lost = [], [0.0, 0.0, 0.0], True, 0.0
    for label, run in results.runs.items():
        if not run.summary:
            rows.append([label, *[NOT_RUN] * 5])
            continue
        hours, joules = run.summary["device_hours"], run.cost.get("energy_joules")
        seconds = run.summary["train_seconds"]
        lost += run.cost.get("lost_device_hours", 0.0)
        counted = counted and joules is not None
        totals = [totals[0] + seconds, totals[1] + hours, totals[2] + (joules or 0.0)]
        rows.append(
            [
                label, f"{seconds / 60:.1f}", f"{hours:.3f}", UNKNOWN if joules is None else f"{joules / 3.6e6:.4f}",
                str(run.cost.get("energy_source", UNKNOWN)), f"{run.summary['samples_per_second']:,.0f}",
            ]
        )  # fmt: skip
    energy = f"{totals[2] / 3.6e6:.4f}" if counted else UNKNOWN
    rows.append(["sum", f"{totals[0] / 60:.1f}", f"{totals[1]:.3f}", energy, "", ""])
    lines = [
        "Training steps alone: not evaluation, checkpoints or the stages before. Runs side by side on one machine slow "
        "each other down."
    ]
    if lost:
        lines.append(f"Beside these, {lost:.3f} device-hours of steps were lost in kills and done again.")
    if price:
        whole = ", lost ones included" if lost else ""
        lines.append(f"At {price:g} a device-hour{whole}: {price * (totals[1] + lost):,.2f}.")
    header = ["run", "minutes", "device-hours", "energy, kWh", "energy is", "pairs/s"]
    return Section("Cost", lines, header, rows)


def stages_section(results: Results, names: Sequence[str]) -> Section:
    """What was done and how long it took."""
    rows = []
    for name in names:
        record = results.records.get(name)
        elsewhere = record is not None and record["seconds"] is None
        seconds = "in a job of its own" if elsewhere else NOT_RUN if record is None else f"{record['seconds']:.0f} s"
        rows.append([name, seconds])
    line = "Of the last attempt, where one was interrupted."
    return Section("Stages", [line], ["stage", "wall-clock"], rows)


def points(estimate: Estimate, *, sign: bool = False, with_n: bool = True) -> str:
    """`12.34 [12.00, 12.68] (3)`."""
    plus = "+" if sign else ""
    text = f"{estimate.mean:{plus}.2f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low:{plus}.2f}, {estimate.high:{plus}.2f}]"
    return f"{text} ({estimate.n})" if with_n else text


def _difference(ours: Estimate | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return ""
    low = None if ours.low is None else ours.low - theirs
    high = None if ours.high is None else ours.high - theirs
    return points(Estimate(ours.n, ours.mean - theirs, low, high), sign=True, with_n=False)


def document(results: Results, sections: Sequence[Section]) -> dict[str, Any]:
    """report.json: everything that the page holds, and the values behind it."""
    experiment = results.request.experiment
    runs = {
        label: {
            "method": run.method, "seed": run.seed, "finished": bool(run.summary), "scores": run.scores,
            "missing_tasks": run.missing, "summary": run.summary,
        }
        for label, run in results.runs.items()
    }  # fmt: skip
    methods = {
        method: {score: found._asdict() for score in results.scores if (found := results.estimate(method, score))}
        for method in experiment.methods
    }
    return {
        "format": 1,
        "experiment": asdict(experiment),
        "stages": {name: {"seconds": each["seconds"], **each["result"]} for name, each in results.records.items()},
        "runs": runs,
        "methods": methods,
        "tables": {part.title: {"header": part.header, "rows": part.rows} for part in sections if part.rows},
    }
