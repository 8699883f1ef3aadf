"""Small worlds for audits: a list, downloads in img2dataset's form, and what sets say about them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]


def uid_of(number: int) -> str:
    """A uid that only its number decides."""
    return hashlib.md5(f"sample {number}".encode()).hexdigest()


def url_of(number: int) -> str:
    return f"http://host{number % 7}.example/{number}.jpg"


def write_published(path: Path, numbers: list[int]) -> None:
    """A list as DataComp publishes it; a number may stand there twice."""
    rows = [{"uid": uid_of(n), "url": url_of(n), "text": f"caption {n}", "score": n / 10} for n in numbers]
    schema = pa.schema([("uid", pa.string()), ("url", pa.string()), ("text", pa.string()), ("score", pa.float64())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


@dataclass
class Shard:
    """One shard to write: attempts (number, error) and the numbers in its tar, with a fault each or none."""

    attempts: list[tuple[int, str | None]] = field(default_factory=list)
    in_tar: list[tuple[int, str | None]] = field(default_factory=list)


ERRORS = {
    "HTTP Error 404: Not Found": "not_found",
    "HTTP Error 403: Forbidden": "forbidden",
    "Use of image disallowed by X-Robots-Tag directive": "opted_out",
    "timed out": "timeout",
    "<urlopen error [Errno 111] Connection refused>": "dead_host",
    "Image decoding error": "not_decoded",
    "image too small": "too_small",
    "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1006)>": "tls",
    "something new": "other",
}


def write_download(folder: Path, shards: list[Shard], *, parquets: bool = True, tars: bool = True) -> None:
    """Write shards as img2dataset does: 00000.tar, 00000.parquet, 00000_stats.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, shard in enumerate(shards):
        name = f"{place:05d}"
        if parquets:
            write_attempts(folder / f"{name}.parquet", shard.attempts)
            stats = {"count": len(shard.attempts), "start_time": 1_700_000_000.0 + 86_400 * place}
            (folder / f"{name}_stats.json").write_text(json.dumps(stats))
        if tars:
            write_tar(folder / f"{name}.tar", shard.in_tar)


def write_attempts(path: Path, attempts: list[tuple[int, str | None]]) -> None:
    resized = ("Image decoding error", "image too small")
    rows = [
        {
            "uid": uid_of(number),
            "url": url_of(number),
            "key": f"{place:09d}",
            "status": "success" if not error else "failed_to_resize" if error in resized else "failed_to_download",
            "error_message": error,
            "sha256": None if error else hashlib.sha256(f"picture {number}".encode()).hexdigest(),
        }
        for place, (number, error) in enumerate(attempts)
    ]
    schema = pa.schema([(n, pa.string()) for n in ("uid", "url", "key", "status", "error_message", "sha256")])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_tar(path: Path, samples: list[tuple[int, str | None]]) -> None:
    """A tar of samples; a fault is "no picture", "empty" or "json"."""
    with tarfile.open(path, "w") as tar:
        for place, (number, fault) in enumerate(samples):
            described = json.dumps({"uid": uid_of(number), "url": url_of(number)}).encode()
            members = {
                "jpg": b"" if fault == "empty" else f"picture {number}".encode(),
                "txt": f"caption {number}".encode(),
                "json": described,
            }
            if fault == "no picture":
                del members["jpg"]
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{place:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def read_uids(path: Path) -> list[str]:
    """Uids of a list that an audit wrote, from its parquet."""
    found: list[str] = pq.read_table(path.with_suffix(".parquet"))["uid"].to_pylist()
    return found
