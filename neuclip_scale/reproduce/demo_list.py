"""The demo's published list: clip art on a web server of this machine, with the faults that links have."""

from __future__ import annotations

import hashlib
import io
import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from neuclip_scale.data.shards import expand_shards, index_shard, read_member
from neuclip_scale.files import atomic_file, write_json
from neuclip_scale.reproduce.errors import ReproduceError

LIST, SERVED, PICTURES = "list.parquet", "served.json", "pictures"
FAULTS = {"not found": 40, "gone": 10, "broken": 10, "page": 10, "cut": 10, "changed": 10}
"""What befalls links, of a thousand: 404, 410, 500, a web page, half a picture, another picture."""


@dataclass(frozen=True)
class Served:
    """What the server has: where it listens, and what goes wrong with which picture."""

    port: int
    faults: dict[str, str]
    """Name of the picture -> one of `FAULTS`."""

    @classmethod
    def read(cls, folder: Path) -> Served:
        """What `write_demo_list` left."""
        return cls(**json.loads((folder / SERVED).read_bytes()))


def write_demo_list(train: Path, folder: Path, limit: int) -> dict[str, Any]:
    """Lay out the pictures of the shards in `train` for the server and write their list; returns the counts.

    The list has DataComp's columns as far as the demo knows them. Equal shards give equal faults. Raises
    `ReproduceError` for shards that hold nothing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures, port = folder / PICTURES, _port(folder)
    pictures.mkdir(parents=True, exist_ok=True)
    rows, faults = [], {}
    for uid, picture, caption in _pairs(train, limit):
        name = f"{uid}.{_format(picture)}"
        with atomic_file(pictures / name) as file:
            file.write(picture)
        width, height = Image.open(io.BytesIO(picture)).size
        fault = _fault(uid)
        if fault:
            faults[name] = fault
        rows.append(
            {
                "uid": uid,
                "url": f"http://127.0.0.1:{port}/{name}",
                "text": caption,
                "original_width": width,
                "original_height": height,
                "sha256": hashlib.sha256(picture).hexdigest(),
            }
        )
    if not rows:
        raise ReproduceError(f"{train}: holds no pair. Give --demo-data a folder that `neuclip demo-data` wrote.")
    write_json(folder / SERVED, asdict(Served(port, faults)))
    with atomic_file(folder / LIST) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return {"listed": len(rows), "links_that_will_fail": len(faults)}


def _pairs(train: Path, limit: int) -> Iterator[tuple[str, bytes, str]]:
    """(uid, bytes of the picture, caption) of each sample, in the order of the shards."""
    given = 0
    for path in expand_shards(str(train)):
        index = index_shard(path)
        with open(path, "rb") as stream:
            for place in range(index.num_samples):
                if given == limit > 0:
                    return
                members = index.members(place)
                picture = next(members[name] for name in ("jpg", "png", "webp") if name in members)
                parts = [read_member(stream.fileno(), span) for span in (members["json"], picture, members["txt"])]
                yield json.loads(parts[0])["uid"], parts[1], parts[2].decode("utf-8")
                given += 1


def _format(picture: bytes) -> str:
    kind = (Image.open(io.BytesIO(picture)).format or "").lower()
    return {"jpeg": "jpg"}.get(kind, kind)


def _fault(uid: str) -> str:
    """What goes wrong with a sample; empty where nothing does."""
    place = int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") % 1000
    for name, share in FAULTS.items():
        if place < share:
            return name
        place -= share
    return ""


def _port(folder: Path) -> int:
    """The port that an earlier attempt has put into its list, or a free one."""
    if (folder / SERVED).is_file():
        return Served.read(folder).port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
