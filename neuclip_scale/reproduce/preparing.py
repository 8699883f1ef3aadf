"""Stages `audit`, `subset`, `reshard` and `index`: from a download to shards that training may read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuclip_scale.reproduce.errors import ReproduceError
from neuclip_scale.reproduce.listing import list_path
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.stages import Stage, neuclip
from neuclip_scale.run_folder import read_object

FOUND_SOMETHING = (0, 1)
"""`neuclip audit` ends with 1 where a download lacks anything, which every real one does."""


def audit_stage(request: Request) -> Stage:
    """What the download lacks of its list, and why."""
    places = request.places
    command = neuclip(
        "audit", "--manifest", list_path(request), "--download", places.download, "--output", places.audit,
        "-j", request.num_workers, accepted=FOUND_SOMETHING,
    )  # fmt: skip
    return Stage(
        "audit", ("download",), {}, (command,), read=lambda: audit_facts(places.audit),
        do=lambda log: (places.audit / "audit.json").unlink(missing_ok=True),  # an audit that crashes leaves none
        produces=(places.audit / "audit.json",),
    )  # fmt: skip


def subset_stage(request: Request) -> Stage:
    """The uids that a filter of the list's columns keeps."""
    experiment, places = request.experiment, request.places
    settings = {"filter": experiment.filter, "options": experiment.filter_options}
    if experiment.filter == "no_filter":
        return Stage("subset", ("list",), settings, told=("no filter: everything",))
    report = places.subset.with_name("subset.json")
    command = neuclip(
        "subset", "--metadata-dir", list_path(request), "--save-path", places.subset, "--name", experiment.filter,
        *experiment.filter_options, "-j", request.num_workers, "--json", report,
    )  # fmt: skip
    return Stage(
        "subset", ("list",), settings, (command,), read=lambda: _kept(report), produces=(places.subset, report)
    )


def reshard_stage(request: Request) -> Stage:
    """Even shards of what the filter kept and the download has, shuffled."""
    experiment, places = request.experiment, request.places
    chosen = ["-s", places.subset] if experiment.filter != "no_filter" else []
    command = neuclip(
        "reshard", "-i", places.download, "-o", places.shards, *chosen, "--shuffle", "--seed", 0,
        "--shard-size", experiment.shard_size, "--allow-missing", "-j", request.num_workers,
        "--json", places.root / "reshard.json",
    )  # fmt: skip
    return Stage(
        "reshard", ("audit", "subset"), {"shard_size": experiment.shard_size}, (command,),
        read=lambda: _resharded(places.root / "reshard.json"), produces=(places.shards,),
    )  # fmt: skip


def index_stage(request: Request) -> Stage:
    """The manifest, and an audit of these very shards, without which no run starts (`data.require_audit`).

    Pairs that the web no longer has, or has with another picture, stop nobody who downloads a list: they are counted.
    """
    places = request.places
    wanted = ["-s", places.subset] if request.experiment.filter != "no_filter" else []
    index = neuclip("data", "index", places.shards, "--output", places.manifest, "--workers", request.num_workers)
    audit = neuclip(
        "audit", "--manifest", list_path(request), "--download", f"shards={places.manifest}", *wanted,
        "--max-missing", 1, "--max-changed", 1, "--output", places.shards_audit, "-j", request.num_workers,
    )  # fmt: skip
    return Stage(
        "index", ("reshard",), {}, (index, audit), read=lambda: audit_facts(places.shards_audit),
        produces=(places.manifest, places.shards_audit / "audit.json"),
    )  # fmt: skip


def audit_facts(folder: Path) -> dict[str, Any]:
    """Digest, counts and reasons of an audit of one download."""
    document = read_object(folder / "audit.json")
    if "downloads" not in document:
        raise ReproduceError(f"{folder / 'audit.json'}: was not written. The log of the stage says why.")
    part = document["downloads"][0]
    counts = {name: count for name, count in part["counts"].items() if count is not None}
    return {
        "usable": document["lists"]["usable"], **counts, "checked": part["content"]["checked"],
        "changed": part["content"]["changed"], "digest": document["digest"], "fingerprint": part["fingerprint"],
        "reasons": {name: found["count"] for name, found in part["reasons"].items()},
    }  # fmt: skip


def _kept(path: Path) -> dict[str, Any]:
    found = read_object(path)
    thresholds = {each["name"]: each["cut"] for each in found["filters"] if each["cut"] is not None}
    return {"rows": found["num_rows"], "kept": found["num_uids"], "digest": found["digest"], "cuts": thresholds}


def _resharded(path: Path) -> dict[str, Any]:
    totals = read_object(path)["totals"]
    return {name: totals[name] for name in ("requested", "written", "missing", "corrupt", "output_shards")}
