"""Pools of small real shards, and the slow, obvious resharder that ours is held to."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from neuclip_scale.commands import reshard

Members = dict[str, bytes]


def uid_of(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


@dataclass
class Sample:
    """A sample of a pool."""

    key: str
    uid: str | None
    size: int = 100
    in_json: bool = True
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def members(self) -> Members:
        record = {"key": self.key, "caption": f"caption of {self.key}", **self.more}
        if self.in_json and self.uid is not None:
            record["uid"] = self.uid
        body = hashlib.shake_128(self.key.encode()).digest(self.size)
        return {"jpg": body, "json": json.dumps(record).encode(), "txt": f"caption of {self.key}".encode()}


def write_tar(path: Path, samples: Iterable[tuple[str, Members]], mtime: float = 0, **options: Any) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), mtime
                archive.addfile(info, io.BytesIO(data))


def write_pool(folder: Path, shards: Sequence[Sequence[Sample]], parquet: bool = True, mtime: float = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        path = folder / f"{number:05d}.tar"
        write_tar(path, ((sample.key, sample.members) for sample in samples), mtime)
        if parquet:
            table = {"key": [sample.key for sample in samples], "uid": [sample.uid for sample in samples]}
            pq.write_table(pa.table(table), path.with_suffix(".parquet"))
    return folder


def simple_pool(folder: Path, shards: int = 3, samples: int = 20, **options: Any) -> list[list[Sample]]:
    made = [
        [Sample(f"{s:05d}{i:04d}", uid_of(f"{s}/{i}"), 37 * (i + 1) * (s + 1) % 3000) for i in range(samples)]
        for s in range(shards)
    ]
    write_pool(folder, made, **options)
    return made


def write_subset(path: Path, uids: Sequence[str]) -> Path:
    np.save(path, np.array([divmod(int(uid, 16), 1 << 64) for uid in uids], dtype="u8,u8"))
    return path


def read_tar(path: Path) -> list[tuple[str, Members]]:
    """Samples by tarfile alone."""
    samples: list[tuple[str, Members]] = []
    with tarfile.open(path) as archive:
        for info in archive:
            key, _, extension = info.name.partition(".")
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            file = archive.extractfile(info)
            assert file is not None
            samples[-1][1][extension] = file.read()
    return samples


def outputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output but the journals and what tells time."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "manifest.json"
    }


def run(*arguments: object) -> int:
    """The command in this process."""
    return reshard.main([str(argument) for argument in arguments])


def start(*arguments: object, prefix: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [*prefix, sys.executable, "-m", "neuclip_scale", "reshard", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        **options,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err
