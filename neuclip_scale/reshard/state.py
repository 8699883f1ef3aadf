"""The folder `.reshard` inside the output: plan, journals and unfinished files of one reshard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neuclip_scale.data.shards import MemberSpan, ShardIndex
from neuclip_scale.files import atomic_file, write_json
from neuclip_scale.reshard.errors import ReshardError
from neuclip_scale.reshard.matching import Counts, Match, Rows
from neuclip_scale.reshard.plan import Plan
from neuclip_scale.reshard.scanning import CorruptItem
from neuclip_scale.reshard.uids import Uids

FOLDER = ".reshard"
_FORMAT = 1
_ARRAYS = ("shard", "first", "length", "written", "starts")


@dataclass(frozen=True)
class SourceFile:
    """An input shard as it was planned."""

    name: str
    num_bytes: int
    mtime_ns: int
    is_plain: bool = True


@dataclass(frozen=True)
class SavedPlan:
    """A plan and all that is reported about it."""

    folder: Path
    """The output folder."""
    settings: dict[str, Any]
    """What the plan depends on."""
    digest: str
    plan: Plan
    sources: list[SourceFile]
    counts: Counts
    input_bytes: int
    texts: dict[str, str] = field(default_factory=dict)
    """Missing uids that are no 32 digits, by their number in hexadecimal."""
    sidecar_faults: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.folder / FOLDER

    def missing(self) -> Uids:
        """Requested uids that no shard has."""
        rows = np.load(self.state / "missing.npy", mmap_mode="r")
        return Uids(rows[0], rows[1])

    def duplicates(self) -> np.ndarray:
        """[d, 2] uint32: shard number and first block of samples whose uid was taken from another sample."""
        return np.load(self.state / "duplicates.npy", mmap_mode="r")

    def corrupt(self) -> Iterator[CorruptItem]:
        """What was found corrupt while the pool was read."""
        with open(self.state / "corrupt.jsonl", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                yield CorruptItem(**json.loads(line))


def save_plan(
    folder: Path, settings: dict[str, Any], match: Match, plan: Plan, sources: list[SourceFile], texts: dict[str, str]
) -> SavedPlan:
    """Write the plan; `plan.json` comes last and makes it valid. Equal arguments give equal files."""
    state = folder / FOLDER
    arrays = _arrays(plan)
    for name, array in {**arrays, "missing": np.stack(match.missing), "duplicates": match.duplicates}.items():
        with atomic_file(state / f"{name}.npy") as file:
            np.save(file, array)
    with atomic_file(state / "corrupt.jsonl") as file:
        for item in match.corrupt:
            file.write((json.dumps(asdict(item)) + "\n").encode())
    digest = _digest(settings, arrays)
    document = {
        "format": _FORMAT,
        "digest": digest,
        "settings": settings,
        "counts": asdict(match.counts),
        "input_bytes": match.num_bytes,
        "texts": texts,
        "sidecar_faults": match.sidecar_faults,
        "sources": [list(asdict(source).values()) for source in sources],
    }
    write_json(state / "plan.json", document)
    return load_plan(folder)


def load_plan(folder: Path) -> SavedPlan:
    """The plan in an output folder, its arrays mapped. Raises `ReshardError` if there is none or it is damaged."""
    state = folder / FOLDER
    try:
        document = json.loads((state / "plan.json").read_bytes())
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
        arrays = {name: np.load(state / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        plan = Plan(Rows(*(arrays[name] for name in _ARRAYS[:-1])), arrays["starts"])
        return SavedPlan(
            folder,
            document["settings"],
            document["digest"],
            plan,
            [SourceFile(*row) for row in document["sources"]],
            Counts(**document["counts"]),
            document["input_bytes"],
            document["texts"],
            document["sidecar_faults"],
        )
    except FileNotFoundError as error:
        raise ReshardError(
            f"--output-dir {folder}: holds no plan ({error.filename} is not there). Plan it first."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReshardError(f"--output-dir {folder}: its plan cannot be read ({error}). Give another folder.") from error


def check_plan(saved: SavedPlan, settings: dict[str, Any]) -> None:
    """Raises `ReshardError` unless the plan is whole and was made with `settings`."""
    for name, value in settings.items():
        if saved.settings.get(name) != value:
            raise ReshardError(
                f"--output-dir {saved.folder}: holds a reshard with another {name}: {saved.settings.get(name)!r}, not "
                f"{value!r}. Give another folder, or the arguments it was begun with."
            )
    if _digest(saved.settings, _arrays(saved.plan)) != saved.digest:
        raise ReshardError(f"--output-dir {saved.folder}: its plan is damaged (digest). Begin anew in another folder.")


def _arrays(plan: Plan) -> dict[str, np.ndarray]:
    rows = plan.rows
    return dict(zip(_ARRAYS, (rows.shard, rows.first, rows.length, rows.written, plan.starts), strict=True))


def _digest(settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for array in arrays.values():
        for begin in range(0, len(array), 1 << 20):
            digest.update(np.ascontiguousarray(array[begin : begin + (1 << 20)]).data)
    return digest.hexdigest()


def save_odd_index(folder: Path, number: int, index: ShardIndex) -> None:
    """Keep the members of a shard whose extents cannot be read by their headers alone."""
    path = folder / FOLDER / "odd" / f"{number:08d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(
            file,
            starts=index.starts,
            extension=index.member_extension,
            offset=index.member_offset,
            size=index.member_size,
            extensions=np.array(index.extensions),
        )


class OddIndex:
    """What `save_odd_index` kept."""

    def __init__(self, folder: Path, number: int) -> None:
        with np.load(folder / FOLDER / "odd" / f"{number:08d}.npz") as arrays:
            self.starts, self.extension = arrays["starts"], arrays["extension"]
            self.offset, self.size, self.extensions = arrays["offset"], arrays["size"], arrays["extensions"]
        self.first = self.offset[self.starts[:-1]] // 512 - 1

    def members(self, first: int) -> list[tuple[str, MemberSpan]]:
        """Extensions and spans of the sample whose first header is block `first`."""
        sample = int(np.searchsorted(self.first, first))
        rows = range(int(self.starts[sample]), int(self.starts[sample + 1]))
        return [
            (str(self.extensions[self.extension[row]]), MemberSpan(int(self.offset[row]), int(self.size[row])))
            for row in rows
        ]
