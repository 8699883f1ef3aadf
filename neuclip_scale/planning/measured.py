"""Speeds out of what was measured: a run's summary.json, or what `tools/bench.py kernels|loss|npn|step --json` wrote.

A file gives seconds of some arithmetic on one device, and the FLOPs of that arithmetic are known: their quotient is the
speed at which the same work is planned for other sizes and numbers of GPUs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuclip_scale.config import ConfigError, ModelConfig, ObjectiveConfig
from neuclip_scale.planning.site import Measured

MAX_BYTES = 64 << 20
LARGEST_SIZE = 10**9
FORMS = {"InfoNCE": "openclip", "margin": "fastclip-v3", "SigLIP": "siglip"}
"""Forms of `bench.py kernels`: the objective whose FLOPs they are."""
ENCODER_SECTIONS = ("encode", "replay", "backward")
NPN_SECTIONS = "npn/"
OBJECTIVE_SECTIONS = ("objective", NPN_SECTIONS, "normalizers/", "similarities/")
CHECKPOINTED = ", checkpointed"
"""In the names of `bench.py step`'s contenders whose blocks are run again in the backward pass."""
NPN_ROWS = ("triton medium", "triton high", "triton highest", "torch medium", "torch high", "torch highest")
"""Contenders of `bench.py npn --device cuda`, those of a bf16 recipe first."""
REMEDY = "Give a run's summary.json, or what `tools/bench.py kernels|loss|npn|step --json` wrote."


def read_measured(paths: Sequence[Path]) -> Measured:
    """Speeds of all files together; of what several have, the first counts. Raises `ConfigError`."""
    found = Measured()
    for path in paths:
        each = _read(path)
        found = Measured(
            encoders=found.encoders or each.encoders,
            objective=found.objective or each.objective,
            normalizer=found.normalizer or each.normalizer,
            normalizer_precision=found.normalizer_precision if found.normalizer else each.normalizer_precision,
            update=found.update or each.update,
            caption_tokens=found.caption_tokens or each.caption_tokens,
            told=(*found.told, *each.told),
        )
    return found


def _read(path: Path) -> Measured:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError("--measured", str(path), f"more than {MAX_BYTES >> 20} MiB", REMEDY)
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("--measured", str(path), f"cannot be read as JSON ({error})", REMEDY) from error
    if isinstance(document, Mapping):
        for has, read in _READERS:
            if has(document):
                return read(document, path)
    raise ConfigError("--measured", str(path), "is no result that has seconds of a step's parts", REMEDY)


class _Fields:
    """Numbers of a document, each checked: what is downloaded may hold anything."""

    def __init__(self, document: Any, path: Path, name: str = "") -> None:
        self._document, self._path, self._name = document, path, name

    def __getitem__(self, key: str) -> _Fields:
        name = f"{self._name}.{key}" if self._name else key
        if not isinstance(self._document, Mapping) or key not in self._document:
            raise ConfigError("--measured", str(self._path), f"has no {name}", REMEDY)
        return _Fields(self._document[key], self._path, name)

    def number(self) -> float:
        """Above zero and finite."""
        value = self._document
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            problem = f"{self._name} is {value!r}, not a number above zero"
            raise ConfigError("--measured", str(self._path), problem, "Measure again, or leave the file out.")
        return float(value)

    def size(self) -> int:
        """A whole number that a machine may have."""
        value = self.number()
        if value > LARGEST_SIZE or value != int(value):
            problem = f"{self._name} is {value:g}, not a whole number up to {LARGEST_SIZE:,}"
            raise ConfigError("--measured", str(self._path), problem, "Measure again, or leave the file out.")
        return int(value)

    def text(self) -> str:
        """Without what would break a line of a terminal."""
        return "".join(c for c in str(self._document)[:80] if c.isprintable())

    def has(self, name: str) -> bool:
        """Whether any section's name begins so."""
        return isinstance(self._document, Mapping) and any(each.startswith(name) for each in self._document)

    def seconds_of(self, names: tuple[str, ...]) -> float:
        """Sum over the sections whose names begin so."""
        sections = self._document if isinstance(self._document, Mapping) else {}
        found = [self[name]["seconds"].number() for name in sections if name.startswith(names)]
        if not found:
            raise ConfigError("--measured", str(self._path), f"{self._name} has no time of {', '.join(names)}", REMEDY)
        return sum(found)


def _summary(document: Mapping[str, Any], path: Path) -> Measured:
    """A run: sections of all its steps on one rank, FLOPs over all ranks."""
    fields = _Fields(document, path)
    cost, world_size = fields["cost"], fields["world_size"].size()
    encoders, objective = (cost["sections"].seconds_of(names) for names in (ENCODER_SECTIONS, OBJECTIVE_SECTIONS))
    where = f"a run of {fields['recipe'].text()} on {world_size} x {fields['device'].text()}"
    waits = ", what its ranks waited for each other included" if world_size > 1 else ""
    speed = cost["objective_flops"].number() / world_size / objective
    return Measured(
        encoders=cost["hardware_flops"].number() / world_size / encoders,
        objective=speed,
        normalizer=speed if cost["sections"].has(NPN_SECTIONS) else None,
        caption_tokens=cost["packed_tokens"].number() if cost.has("packed_tokens") else None,
        told=(f"encoders and objective: {path}, {where}{waits}",),
    )


def _npn(document: Mapping[str, Any], path: Path) -> Measured:
    """`bench.py npn`: all parts of an iteration."""
    fields = _Fields(document, path)
    options, parts, flops = fields["options"], fields["measured"]["parts"], fields["by_flops"]
    objective = parts.seconds_of(OBJECTIVE_SECTIONS)
    preset = options["preset"].text()
    speed = (flops["similarities"]["flops"].number() + flops["npn"]["flops"].number()) / objective
    return Measured(
        encoders=flops["encoders"]["flops"].number() / parts["encoders"]["seconds"].number(),
        objective=speed,
        normalizer=speed,
        update=parts["optimizer"]["seconds"].number() / _trained(preset, path),
        told=(f"encoders, objective and update: {path}, {preset} on {fields['machine']['cpu'].text()}",),
    )


def _npn_on_gpu(document: Mapping[str, Any], path: Path) -> Measured:
    """`bench.py npn --device cuda`: the NPN beside AdamW, which has updated all of the preset."""
    fields = _Fields(document, path)
    gpu, preset, size = fields["gpu"], fields["options"]["preset"].text(), fields["options"]["batch_size"].size()
    row = _row(document["gpu"], path, *NPN_ROWS)
    seconds = _Fields(row, path, "gpu.rows")["npn_ms"].number() / 1000
    name = gpu["name"].text()
    return Measured(
        normalizer=fields["by_flops"]["npn"]["flops"].number() / seconds,
        normalizer_precision=row["contender"].split()[1],
        update=gpu["shared_ms"]["optimizer"].number() / 1000 / _trained(preset, path),
        told=(f"NPN and update: {path}, {row['contender']} with B = {size:,}, AdamW of {preset} on {name}",),
    )


def _step(document: Mapping[str, Any], path: Path) -> Measured:
    """`bench.py step`: a whole step of ours, all of whose time counts as the encoders'."""
    fields = _Fields(document, path)
    cpu = fields["machine"]["cpu"].text()
    return _whole_step(fields, _row(document, path, "ours, openclip"), "cpu_seconds", path, cpu)


def _step_on_gpu(document: Mapping[str, Any], path: Path) -> Measured:
    """`bench.py step --device cuda`: with compiled towers where these were measured, and kept activations."""
    whole = "ours, openclip"
    row = _row(document, path, f"{whole}, compiled", whole, f"{whole}{CHECKPOINTED}, compiled", whole + CHECKPOINTED)
    fields = _Fields(document, path)
    return _whole_step(fields, row, "seconds", path, fields["device"].text())


def _whole_step(fields: _Fields, row: Mapping[str, Any], key: str, path: Path, device: str) -> Measured:
    from neuclip_scale.planning.sharding import planned
    from neuclip_scale.telemetry.flops import encoder_flops

    options = fields["options"]
    if options.has("caption_tokens") and options["caption_tokens"].text() != "0.0":
        raise ConfigError("--measured", str(path), "its captions were packed", "Measure without --caption-tokens.")
    preset, pairs = options["preset"].text(), options["batch_size"].size()
    how = row["contender"].removeprefix("ours, openclip")
    section = replace(_model(preset, path), grad_checkpointing=CHECKPOINTED in how)
    flops = encoder_flops(section, planned(section, False)).executed(pairs, (0, 0))
    told = f"encoders: {path}, whole steps of {preset}{how} on {device}, objective and update included"
    return Measured(encoders=flops / _Fields(row, path, "rows")[key].number(), told=(told,))


def _kernels(document: Mapping[str, Any], path: Path) -> Measured:
    """`bench.py kernels`: losses on a GPU; the first that was measured."""
    fields = _Fields(document, path)
    names = [f"{form} {way}" for way in ("triton", "kernels", "torch") for form in FORMS]
    row = _row(document, path, *names)
    seconds = _Fields(row, path, "rows")["milliseconds"].number() / 1000
    return _objective(fields, path, FORMS[row["contender"].split()[0]], seconds, fields["device"].text())


def _loss(document: Mapping[str, Any], path: Path) -> Measured:
    """`bench.py loss`: losses on a CPU; NeuCLIP's where it was measured, its NPN included."""
    fields = _Fields(document, path)
    row = _row(document, path, "neuclip", "openclip", "fastclip-v3", "siglip")
    seconds = _Fields(row, path, "rows")["cpu_seconds"].number()
    return _objective(fields, path, row["contender"], seconds, fields["machine"]["cpu"].text())


def _objective(fields: _Fields, path: Path, name: str, seconds: float, device: str) -> Measured:
    from neuclip_scale.objectives import create_objective
    from neuclip_scale.objectives.registry import Problem
    from neuclip_scale.similarity import BatchShape

    size, d = fields["options"]["batch_size"].size(), fields["options"]["embed_dim"].size()
    problem = Problem(embed_dim=d, dataset_size=size, num_epochs=1.0, global_batch_size=size)
    import torch

    with torch.device("meta"):
        objective = create_objective(ObjectiveConfig(name=name), problem)  # type: ignore[arg-type]
    flops = objective.flops(BatchShape(size, size, d))
    speed = flops / seconds
    told = f"objective: {path}, {name} with B = {size:,} on {device}"
    return Measured(objective=speed, normalizer=speed if name == "neuclip" else None, told=(told,))


def _row(document: Mapping[str, Any], path: Path, *names: str) -> Mapping[str, Any]:
    """The first of these contenders that was measured."""
    rows = document.get("rows")
    found = {
        row["contender"]: row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, Mapping) and isinstance(row.get("contender"), str)
    }
    for name in names:
        if name in found:
            return found[name]
    raise ConfigError("--measured", str(path), f"has no row of {' or '.join(map(repr, names))}", REMEDY)


def _model(preset: str, path: Path) -> ModelConfig:
    from neuclip_scale.models.presets import PRESETS

    if preset not in PRESETS:
        raise ConfigError("--measured", str(path), f"options.preset {preset!r} is no preset", "Measure a known one.")
    return ModelConfig(preset=preset)


def _trained(preset: str, path: Path) -> int:
    from neuclip_scale.planning.sharding import planned

    return sum(p.numel() for p in planned(_model(preset, path), False).parameters() if p.requires_grad)


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda document: all(isinstance(document, Mapping) and key in document for key in keys)


def _has_gpu_rows(document: Mapping[str, Any]) -> bool:
    gpu = document.get("gpu")
    return "by_flops" in document and isinstance(gpu, Mapping) and "rows" in gpu


def _is_step_on_gpu(document: Mapping[str, Any]) -> bool:
    return _options_have("micro_batches")(document) and str(document["options"].get("device")).startswith("cuda")


def _options_have(key: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda document: isinstance(document.get("options"), Mapping) and key in document["options"]


_READERS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any], Path], Measured]], ...] = (
    (_has("cost", "samples_seen"), _summary),
    (_has_gpu_rows, _npn_on_gpu),
    (_has("measured", "by_flops"), _npn),
    (_options_have("forms"), _kernels),
    (_is_step_on_gpu, _step_on_gpu),
    (_options_have("micro_batches"), _step),
    (_options_have("chunk_size"), _loss),
)
