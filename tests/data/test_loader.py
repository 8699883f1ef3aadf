from __future__ import annotations

import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import byte_tokenizer, make_loader, take
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neuclip_scale.config import DataConfig
from neuclip_scale.data import stream_dataset
from neuclip_scale.data.batch import Batch
from neuclip_scale.data.digest import batch_digest
from neuclip_scale.data.loader import LoadedBatch, TrainLoader
from neuclip_scale.data.manifest import Manifest, build_manifest
from neuclip_scale.data.shards import expand_shards, index_shard, write_shard
from neuclip_scale.data.synthetic import COLOURS, write_synthetic_shards

STEPS = 7


def run(manifest: Manifest, world_size: int, steps: int = STEPS, **options: Any) -> list[list[LoadedBatch]]:
    """[step][rank]"""
    ranks = [take(make_loader(manifest, rank=r, world_size=world_size, **options), steps) for r in range(world_size)]
    return [list(step) for step in zip(*ranks, strict=True)]


def digest(step: list[LoadedBatch]) -> str:
    return batch_digest(torch.cat([loaded.stream_digests for loaded in step]).tolist())


def contents(step: list[LoadedBatch]) -> str:
    return batch_digest(torch.cat([loaded.content_digests for loaded in step]).tolist())


def positions(step: list[LoadedBatch]) -> dict[int, int]:
    return {k: v for loaded in step for k, v in loaded.stream_positions.items()}


def assert_equal(ours: list[list[LoadedBatch]], reference: list[list[LoadedBatch]]) -> None:
    for step, expected in zip(ours, reference, strict=True):
        for field in ("images", "tokens", "sample_index"):
            a, b = (torch.cat([getattr(part.batch, field) for part in parts]) for parts in (step, expected))
            assert torch.equal(a, b), field
        assert [uid for part in step for uid in part.batch.uids] == [u for p in expected for u in p.batch.uids]
        assert digest(step) == digest(expected)
        assert contents(step) == contents(expected)
        assert positions(step) == positions(expected)


@pytest.fixture(scope="module")
def reference(clean_manifest: Manifest) -> list[list[LoadedBatch]]:
    return run(clean_manifest, 1)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 0), (2, 1), (2, 3), (4, 0), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_and_workers(
    clean_manifest: Manifest, reference: list[list[LoadedBatch]], world_size: int, workers: int
) -> None:
    assert_equal(run(clean_manifest, world_size, num_workers=workers), reference)


def test_what_a_batch_holds(clean_manifest: Manifest, reference: list[list[LoadedBatch]]) -> None:
    batch = reference[0][0].batch
    assert batch.images.shape == (12, 3, 16, 16)
    assert (batch.images.dtype, batch.tokens.dtype, batch.sample_index.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )
    assert reference[0][0].num_read == 12
    for index, uid, tokens in zip(batch.sample_index.tolist(), batch.uids, batch.tokens, strict=True):
        shard, position = clean_manifest.locate(index)
        entry = clean_manifest.shards[shard]
        key = index_shard(entry.path).keys[position]
        with open(entry.path, "rb") as stream:
            data = stream.read()
        assert f'"key": "{key}"'.encode() in data
        assert uid.encode() in data
        assert bytes(tokens.tolist()).split()[1].decode() in COLOURS
    assert digest(reference[0]) != digest(reference[1])
    # 7 steps of 12 are nearly two passes over 45 samples; each stream starts its second in its own time.
    seen = Counter(i for step in reference for i in step[0].batch.sample_index.tolist())
    assert set(seen) == set(range(45))
    assert max(seen.values()) == 2


def test_another_caption_or_picture_of_a_uid_shows(tmp_path: Path) -> None:
    """Sizes in the tar stay what they were, so the manifest's fingerprint does too."""
    pictures = [png((20 * i, 0, 7)) for i in range(12)]
    samples = [
        {"__key__": f"k{i}", "png": pictures[i], "txt": f"caption {i:02d}", "json": json.dumps({"uid": f"u{i}"})}
        for i in range(12)
    ]
    found = {}
    for change in ("none", "caption", "picture"):
        changed = [dict(sample) for sample in samples]
        if change == "caption":
            changed[3]["txt"] = "caption 77"
        if change == "picture":
            changed[3]["png"] = pictures[4]
        (tmp_path / change).mkdir()
        write_shard(tmp_path / change / "0.tar", changed)
        manifest = build_manifest(expand_shards(str(tmp_path / change)))
        step = [take(make_loader(manifest), 1)[0]]
        found[change] = (manifest.fingerprint, digest(step), contents(step))
    same, caption, picture = found.values()
    assert same[:2] == caption[:2] == picture[:2]
    assert len({same[2], caption[2], picture[2]}) == 3


def png(colour: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "png", compress_level=0)  # as many bytes for any colour
    return file.getvalue()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (4, 1)])
def test_resume_equals_an_uninterrupted_run(
    clean_manifest: Manifest, reference: list[list[LoadedBatch]], world_size: int, workers: int
) -> None:
    saved = [positions(reference[2])[stream] for stream in range(4)]
    ranks = []
    for rank in range(world_size):
        loader = make_loader(clean_manifest, rank=rank, world_size=world_size, num_workers=workers)
        loader.load_positions(saved)
        ranks.append(take(loader, STEPS - 3))
    assert_equal([list(step) for step in zip(*ranks, strict=True)], reference[3:])


@settings(deadline=None, max_examples=20)
@given(
    streams=st.sampled_from([1, 2, 4, 8]),
    share=st.integers(1, 4),
    window=st.integers(1, 60),
    replacement=st.booleans(),
    weights=st.sampled_from([(), (1.0, 1.0), (0.2, 3.0)]),
    stop=st.integers(0, 5),
    data=st.data(),
)
def test_random_settings(
    clean_manifest: Manifest,
    streams: int,
    share: int,
    window: int,
    replacement: bool,
    weights: tuple[float, ...],
    stop: int,
    data: st.DataObject,
) -> None:
    """Also with fewer shards than streams, several epochs, sources with weights, draws with replacement."""
    options = {"num_streams": streams, "shuffle_window": window, "global_batch_size": streams * share}
    options |= {"replacement": replacement, "weights": weights}
    manifest = Manifest(tuple(replace(s, source=int(row > 2)) for row, s in enumerate(clean_manifest.shards)))
    worlds = st.sampled_from([w for w in (1, 2, 4) if streams % w == 0])
    expected = run(manifest, 1, 6, **options)
    assert_equal(run(manifest, data.draw(worlds), 6, **options), expected)
    world_size, ranks = data.draw(worlds), []
    for rank in range(world_size):
        loader = make_loader(manifest, rank=rank, world_size=world_size, **options)
        if stop:
            loader.load_positions(positions(expected[stop - 1]))
        ranks.append(take(loader, 6 - stop))
    assert_equal([list(step) for step in zip(*ranks, strict=True)], expected[stop:])


def test_a_second_iteration_goes_on(clean_manifest: Manifest, reference: list[list[LoadedBatch]]) -> None:
    loader = make_loader(clean_manifest, num_workers=2)
    parts = [*take(loader, 3), *take(loader, STEPS - 3)]
    assert_equal([[loaded] for loaded in parts], reference)


def test_resume_decodes_nothing_before_the_position(clean_manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0

    def counting(data: bytes, max_pixels: int, decoder: str) -> Image.Image:
        nonlocal decoded
        decoded += 1
        return Image.new("RGB", (20, 20))

    monkeypatch.setattr(stream_dataset, "open_picture", counting)
    loader = make_loader(clean_manifest)
    loader.load_positions([1_000_000_007] * 4)
    take(loader, 1)
    assert decoded == 12


def test_bad_positions_and_shares(clean_manifest: Manifest) -> None:
    loader = make_loader(clean_manifest)
    with pytest.raises(ValueError, match="3 stream positions"):
        loader.load_positions([0, 1, 2])
    with pytest.raises(ValueError, match=r"stream\(s\) \[3\]"):
        loader.load_positions({0: 0, 1: 1, 2: 2})
    with pytest.raises(ValueError, match="num_streams = 4"):
        make_loader(clean_manifest, world_size=3)
    with pytest.raises(ValueError, match="global_batch_size = 10"):
        make_loader(clean_manifest, global_batch_size=10)


def test_more_workers_than_streams_are_capped_and_said_once(
    clean_manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaders = [make_loader(clean_manifest, rank=r, world_size=2, num_workers=6) for r in range(2)]
    assert [loader.num_workers for loader in loaders] == [2, 2]
    assert len(caplog.records) == 1
    assert "data.num_workers = 6" in caplog.text


# Worker processes


class ThreadCount:
    """A picklable transform that shows what the worker's process is like."""

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor:
        ignored = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        return torch.tensor([float(torch.get_num_threads()), float(os.getpid()), float(ignored)])


def probe_loader(manifest: Manifest) -> TrainLoader:
    return TrainLoader(
        manifest,
        DataConfig(num_streams=4, num_workers=2, prefetch_batches=1),
        global_batch_size=4,
        rank=0,
        world_size=1,
        seed=0,
        transform=ThreadCount(),
        tokenizer=byte_tokenizer,
    )


def test_a_worker_has_one_thread_and_leaves_signals_alone(clean_manifest: Manifest) -> None:
    threads, pids, ignored = take(probe_loader(clean_manifest), 1)[0].batch.images.T.tolist()
    assert threads == [1.0] * 4
    assert ignored == [1.0] * 4
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_a_worker_outlives_the_signals_that_slurm_sends_to_all(clean_manifest: Manifest) -> None:
    iterator = iter(probe_loader(clean_manifest))
    pid = int(next(iterator).batch.images[0, 1])
    for number in ("INT", "USR1", "TERM"):
        subprocess.run(["kill", f"-{number}", str(pid)], check=True)
    for _ in range(5):
        assert int(next(iterator).batch.images[0, 1]) == pid
    iterator.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_loader import probe_loader
from neuclip_scale.data.manifest import Manifest
batches = iter(probe_loader(Manifest.load(sys.argv[2])))
pid = int(next(batches).batch.images[0, 1])
print(pid, flush=True)
"""
FAIL = SCRIPT + "raise ValueError('the run fails here')"
KILL = SCRIPT + "os.kill(pid, signal.SIGKILL)\nfor _ in range(10): next(batches)"


def run_script(script: str, manifest: Manifest, folder: Path) -> tuple[subprocess.CompletedProcess[str], int]:
    """In a process of its own: torch's SIGCHLD handler raises wherever the main thread is, pytest's code too."""
    manifest.save(folder / "manifest.json")
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(folder / "manifest.json")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended, int(ended.stdout)


def test_a_failing_run_does_not_wait_for_its_workers(clean_manifest: Manifest, tmp_path: Path) -> None:
    ended, pid = run_script(FAIL, clean_manifest, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("ValueError: the run fails here")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_worker_is_an_error_that_names_it(clean_manifest: Manifest, tmp_path: Path) -> None:
    ended, pid = run_script(KILL, clean_manifest, tmp_path)
    assert ended.returncode == 1
    assert f"DataLoader worker (pid {pid}) is killed by signal: Killed" in ended.stderr


def test_what_workers_get_can_be_pickled(clean_manifest: Manifest) -> None:
    loader = make_loader(clean_manifest)
    dataset = pickle.loads(pickle.dumps(loader._data_loader().dataset))
    assert torch.equal(next(iter(dataset)).batch.to("cpu").images, take(loader, 1)[0].batch.images)


# Batch


def test_split_and_to() -> None:
    batch = Batch(torch.rand(5, 3, 2, 2), torch.ones(5, 4, dtype=torch.int64), torch.arange(5), tuple("abcde"))
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert parts[2].uids == ("e",)
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert batch.to("meta").tokens.device.type == "meta"
    with pytest.raises(ValueError, match="micro_batch_size = 0"):
        batch.split(0)


def test_synthetic_shards_are_reproducible(tmp_path: Any) -> None:
    a = write_synthetic_shards(tmp_path / "a", 7, 3, 16, seed=4)
    b = write_synthetic_shards(tmp_path / "b", 7, 3, 16, seed=4)
    assert [index_shard(path).num_samples for path in a] == [3, 3, 1]
    assert [Path(path).read_bytes() for path in a] == [Path(path).read_bytes() for path in b]
