"""Slow and silent storage: told with rank, worker and shard, and in the end an error, not a hang."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest
from data_helpers import make_loader, take

from neuclip_scale.config import DataConfig
from neuclip_scale.data.run_manifest import run_manifest
from neuclip_scale.data.shards import storage
from neuclip_scale.data.stall import DataStall
from neuclip_scale.data.synthetic import write_synthetic_shards


def fifo_manifest(tmp_path: Path) -> tuple[object, Path]:
    """Two shards of which the second becomes a pipe that nobody writes to, as a hung file system would be."""
    write_synthetic_shards(tmp_path / "s", 24, 12, 24, seed=1)
    manifest = run_manifest(tmp_path / "manifest.json", DataConfig(train=str(tmp_path / "s")))
    shard = tmp_path / "s" / "00001.tar"
    content = shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)
    (tmp_path / "content").write_bytes(content)
    return manifest, shard


def test_a_worker_that_hangs_ends_the_run_with_its_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest, shard = fifo_manifest(tmp_path)
    loader = make_loader(
        manifest, num_workers=2, rank=1, world_size=2, stall_warning_seconds=0.5, stall_timeout_seconds=3.0
    )
    with caplog.at_level(logging.WARNING), pytest.raises(DataStall) as error:
        take(loader, 2)
    assert f"reads {shard}" in str(error.value)
    assert "rank 1 has waited" in str(error.value)
    assert "data.stall_timeout_seconds = 3" in str(error.value)
    told = [record.message for record in caplog.records if "has waited" in record.message]
    assert 1 <= len(told) <= 3  # after half a second, one, and two
    assert str(shard) in told[0]


def test_a_process_that_reads_itself_is_watched_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.01)
    manifest, shard = fifo_manifest(tmp_path)

    def mend() -> None:
        while not any("has waited" in record.message for record in caplog.records):
            time.sleep(0.05)
        waiting = shard.rename(tmp_path / "pipe")
        (tmp_path / "content").rename(shard)
        with open(waiting, "wb"):  # the reader meets the end of an empty file, and reads anew
            pass

    mender = threading.Thread(target=mend, daemon=True)
    mender.start()
    with caplog.at_level(logging.WARNING):
        loaded = take(make_loader(manifest, num_workers=0, stall_warning_seconds=0.5), 2)
    mender.join()
    assert any(f"the training process itself reads {shard}" in record.message for record in caplog.records)
    assert sorted(index for each in loaded for index in each.batch.sample_index.tolist()) == list(range(24))
