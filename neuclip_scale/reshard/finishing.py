"""The end of a reshard: totals that add up, and the files that tell of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from neuclip_scale.data.manifest import assemble_manifest
from neuclip_scale.data.shards.names import split_name
from neuclip_scale.files import atomic_file
from neuclip_scale.reshard.copying import CopiedShard, output_name
from neuclip_scale.reshard.errors import ReshardError, told_to_user
from neuclip_scale.reshard.journal import Journal, read_journals
from neuclip_scale.reshard.state import SavedPlan
from neuclip_scale.reshard.uids import uid_text

BLOCK = 512
_ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Totals:
    """Samples, unless another unit is named. Every sum is checked when it is made."""

    requested: int
    """With repeats; all uids of the pool, or all the predicate holds for, when there is no list."""
    found: int
    missing: int
    requested_uids: int
    missing_uids: int
    read: int
    selected: int
    """Of those read; one that is wanted twice counts once."""
    duplicated: int
    not_selected: int
    corrupt: int
    """Of those read."""
    corrupt_shards: int
    """Input shards that are damaged or hold what was ignored; their whole samples are used."""
    dropped: int
    """Found, but with a picture that could not be worked on."""
    written: int
    written_members: int
    written_bytes: int
    output_shards: int
    without_boxes: int
    """Written without a `face_bboxes` in their json, where faces were to be blurred."""

    @property
    def is_whole(self) -> bool:
        """Whether every requested sample was written."""
        return self.written == self.requested


def add_up(saved: SavedPlan, shards: list[CopiedShard]) -> Totals:
    """Totals of a finished reshard; raises AssertionError when they contradict each other."""
    counts = saved.counts
    counts.check()
    written, dropped = sum(shard.samples for shard in shards), sum(len(shard.corrupt) for shard in shards)
    assert len(saved.plan.rows) == counts.found == written + dropped, (counts, written, dropped)
    return Totals(
        requested=counts.requested,
        found=counts.found,
        missing=counts.missing,
        requested_uids=counts.requested_uids,
        missing_uids=counts.missing_uids,
        read=counts.read,
        selected=counts.selected,
        duplicated=counts.duplicated,
        not_selected=counts.not_selected,
        corrupt=counts.corrupt,
        corrupt_shards=sum(not item.key for item in saved.corrupt()),
        dropped=dropped,
        written=written,
        written_members=sum(shard.members for shard in shards),
        written_bytes=sum(shard.num_bytes for shard in shards),
        output_shards=len(shards),
        without_boxes=sum(shard.without_boxes for shard in shards),
    )


def finish(saved: SavedPlan, input_dir: Path) -> Totals:
    """Write sizes.json, manifest.json, missing_uids.txt, duplicates.jsonl, corrupt.jsonl and reshard.json.

    Raises `ReshardError` while an output shard is missing, and when a file of such a name was not written here.
    """
    with told_to_user("writing reports"), Journal(saved.folder, saved.digest, "reports") as journal:
        known, reports = read_journals(saved.folder, saved.digest)
        shards = _complete(saved, known)
        totals = add_up(saved, shards)
        folder = saved.folder

        def claim(name: str) -> None:
            if name in reports:
                for partial in folder.glob(f".{name}.*.tmp"):  # of a run that was killed; the journal keeps others out
                    partial.unlink()
            else:
                if (folder / name).exists():
                    raise ReshardError(f"{folder / name}: was not written here. Move it away, and run --finish.")
                journal.append(report=name)

        def write(name: str, fill: Callable[[IO[bytes]], object]) -> None:
            claim(name)
            with atomic_file(folder / name) as file:
                fill(file)

        sizes = {output_name(shard.number): shard.samples for shard in shards}
        write("sizes.json", lambda file: file.write(_json(sizes)))
        write("missing_uids.txt", lambda file: file.writelines(_missing_lines(saved)))
        write("duplicates.jsonl", lambda file: file.writelines(_duplicate_lines(saved, input_dir)))
        write("corrupt.jsonl", lambda file: file.writelines(_corrupt_lines(saved, shards)))
        if totals.written:
            manifest = assemble_manifest([_manifest_row(folder, shard) for shard in shards])
            claim("manifest.json")
            manifest.save(folder / "manifest.json", relative=True)
        document = {
            "totals": asdict(totals),
            "plan": saved.digest,
            "settings": saved.settings,
            "parquets_not_believed": saved.sidecar_faults,
        }
        write("reshard.json", lambda file: file.write(_json(document)))
    return totals


def _manifest_row(folder: Path, shard: CopiedShard) -> dict[str, Any]:
    """A shard as `data.manifest.index_row` has it. It was read back when it was written: its size is enough now."""
    path = folder / output_name(shard.number)
    status = path.stat()
    if status.st_size != shard.num_bytes:
        raise ReshardError(f"{path}: was changed since it was written. Delete it and run the same command again.")
    return {
        "path": str(path),
        "num_samples": shard.samples,
        "num_bytes": shard.num_bytes,
        "mtime_ns": status.st_mtime_ns,
        "fault": "" if shard.samples else "holds no sample",
    }


def _complete(saved: SavedPlan, known: dict[int, CopiedShard]) -> list[CopiedShard]:
    numbers = range(saved.plan.num_outputs)
    absent = [number for number in numbers if number not in known or not (saved.folder / output_name(number)).exists()]
    if absent:
        raise ReshardError(
            f"--output-dir {saved.folder}: {len(absent)} of {len(numbers)} output shards are not complete, first "
            f"{output_name(absent[0])}. Run the parts that make them first (--part I/N), then --finish."
        )
    return [known[number] for number in numbers]


def _missing_lines(saved: SavedPlan) -> Iterator[bytes]:
    missing = saved.missing()
    for begin in range(0, len(missing.high), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        for high, low in zip(missing.high[rows].tolist(), missing.low[rows].tolist(), strict=True):
            text = uid_text(high, low)
            yield (saved.texts.get(text, text) + "\n").encode()


def _duplicate_lines(saved: SavedPlan, input_dir: Path) -> Iterator[bytes]:
    """Shard, place and key of each; the key is read from the header at that place."""
    for shard, first in saved.duplicates().tolist():
        name = saved.sources[shard].name
        with open(input_dir / name, "rb", buffering=0) as file:
            file.seek(first * BLOCK)
            header = file.read(100)
        key = split_name(header.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
        yield _line({"shard": name, "key": key[0] if key else "", "offset": first * BLOCK})


def _corrupt_lines(saved: SavedPlan, shards: list[CopiedShard]) -> Iterator[bytes]:
    for item in saved.corrupt():
        yield _line({**asdict(item), "dropped": bool(item.key)})
    for shard in shards:
        for name, key, reason in shard.corrupt:
            yield _line({"shard": name, "key": "", "reason": reason, "dropped": True, "output_key": key})


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
