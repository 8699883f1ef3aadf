"""Uids of each class as files: parquet with a `uid` column, and DataComp's .npy of `u8,u8` for `neuclip reshard -s`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from neuclip_scale.files import atomic_file
from neuclip_scale.queries.engines import Engine, batches
from neuclip_scale.reshard.request import SUBSET_DTYPE
from neuclip_scale.reshard.uids import parse_uids


def write_list(engine: Engine, query: Any, path: Path) -> int:
    """Write `query`, sorted by uid, as PATH.parquet and its uids as PATH.npy; returns the number of rows."""
    parquet = path.with_name(path.name + ".parquet")
    num_rows = engine.save(query.order_by("uid"), parquet)
    with atomic_file(path.with_name(path.name + ".npy")) as stream:
        np.lib.format.write_array_header_1_0(
            stream, {"descr": np.lib.format.dtype_to_descr(SUBSET_DTYPE), "fortran_order": False, "shape": (num_rows,)}
        )
        for batch in batches(parquet, ["uid"]):
            uids, _ = parse_uids(batch.column(0).to_pylist())
            rows = np.empty(len(batch), dtype=SUBSET_DTYPE)
            rows["f0"], rows["f1"] = uids
            stream.write(rows.tobytes())
    return num_rows


def remove_lists(output: Path) -> None:
    """Remove the lists that the audit whose audit.json is in `output` says it wrote: the next one may write others."""
    try:
        names = json.loads((output / "audit.json").read_bytes())["lists"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in names:
        path = output / "lists" / str(name)
        if path.resolve().is_relative_to((output / "lists").resolve()):  # the file may have been edited
            for suffix in (".parquet", ".npy"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
