"""Which samples a training run saw: the canonical order up to the positions that the run has written down."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from neuclip_scale.audit.errors import AuditError
from neuclip_scale.config import ConfigError, Recipe, load_recipe
from neuclip_scale.data.manifest import Manifest, ManifestError
from neuclip_scale.data.mixing import create_order
from neuclip_scale.data.shards import storage
from neuclip_scale.files import atomic_file
from neuclip_scale.run_folder import last_metrics, read_object
from neuclip_scale.untrusted_text import printable

_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TrainedRun:
    """A run folder's data, as far as an audit needs it."""

    name: str
    path: Path
    recipe: Recipe
    manifest: Manifest
    positions: tuple[int, ...]
    """Of all streams."""
    are_exact: bool
    """False where the run has not written its positions: then they follow from the number of samples seen, and
    samples that it passed over make them fall short."""
    samples_seen: int

    @property
    def shards(self) -> dict[str, int]:
        """Samples of each shard by its name without `.tar`."""
        return {_stem(shard.path): shard.num_samples for shard in self.manifest.shards}

    @property
    def tars(self) -> set[str]:
        """Real paths of its shards."""
        return {os.path.realpath(shard.path) for shard in self.manifest.shards}

    @property
    def fingerprint(self) -> str:
        """Changes with all that decides what `write` writes."""
        decides = [self.positions, self.recipe.seed, asdict(self.recipe.data), sorted(set(self._skipped()))]
        return json.dumps([self.manifest.fingerprint, *decides], default=str)

    def write(self, path: Path) -> None:
        """Write a parquet with `shard`, `position` and `times` of every sample that was seen and could be used."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        times = np.zeros(self.manifest.num_samples, dtype=np.int32)
        create_order(self.manifest, self.recipe.data, self.recipe.seed).count_reads(self.positions, times)
        times[list(self._skipped())] = 0
        schema = pa.schema([("shard", pa.string()), ("position", pa.int64()), ("times", pa.int64())])
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream, pq.ParquetWriter(stream, schema) as writer:
            for shard in self.manifest.shards:
                own = times[shard.first_index : shard.first_index + shard.num_samples]
                seen = np.flatnonzero(own)
                columns = [pa.array([_stem(shard.path)] * len(seen)), pa.array(seen), pa.array(own[seen].astype("i8"))]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROWS_AT_ONCE)

    def _skipped(self) -> Iterator[int]:
        """Indices of samples that were read and could not be used."""
        for file in sorted(self.path.glob("skipped/*.jsonl")):
            for line in file.read_text("utf-8", errors="replace").splitlines():
                found = re.search(r'"sample_index": (\d+)', line)  # null for a whole shard; the last line may be torn
                if found and int(found[1]) < self.manifest.num_samples:
                    yield int(found[1])


def read_run(path: Path, taken: Sequence[str] = ()) -> TrainedRun:
    """Read a run folder, named after it, with a number where that name is `taken`.

    Raises `AuditError` when it does not tell what was seen.
    """
    try:
        recipe = load_recipe(path / "config.yaml")
        manifest = Manifest.load(path / "manifest.json")
    except (OSError, ManifestError, ConfigError) as error:
        raise AuditError(f"--run {path}: {error}. Give a folder that `neuclip train` wrote, whole.") from error
    summary = read_object(path / "summary.json")
    last = last_metrics(path, 1)
    seen = (last[0] if last else summary).get("samples_seen")
    if not isinstance(seen, int) or seen <= 0:
        raise AuditError(f"--run {path}: neither metrics.jsonl nor summary.json tells how many samples it saw.")
    streams, told = recipe.data.num_streams, summary.get("stream_positions")
    are_exact = isinstance(told, list) and len(told) == streams and summary.get("samples_seen") == seen
    positions = tuple(map(int, told)) if are_exact and told else (seen // streams,) * streams
    base = re.sub("[^A-Za-z0-9-]+", "_", path.resolve().name) or "run"
    name = next(each for each in (base, *(f"{base}-{n}" for n in range(2, 1000))) if each not in taken)
    return TrainedRun(name, path, recipe, manifest, positions, are_exact, seen)


def _stem(address: str) -> str:
    return printable(storage.base_name(address).removesuffix(".tar"))
