"""Samples and shards that are broken: counted, listed with shard and key, passed over; many end the run."""

from __future__ import annotations

import atexit
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_helpers
import pytest
from data_helpers import byte_tokenizer, make_loader, take
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from neuclip_scale.data import stream_dataset
from neuclip_scale.data.manifest import Manifest, ManifestError
from neuclip_scale.data.shards import ShardIndex, index_shard, write_shard
from neuclip_scale.data.skips import SkipLog, SkippedSample, TooManyBadSamples, check_bad_fraction
from neuclip_scale.data.stream_dataset import init_worker


def jpeg(size: int = 24) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((size, size), 60).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A few bytes that claim to be a PNG of 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "noise": ({"jpg": b"\xff\xd8 nothing", "txt": "x"}, "not a picture"),
    "cut": ({"jpg": jpeg(64)[:-400], "txt": "x"}, "truncated"),
    "empty": ({"jpg": b"", "txt": "x"}, "not a picture"),
    "bomb": ({"png": bomb(), "txt": "x"}, "60000x60000|DecompressionBomb"),
    "large": ({"png": bomb(9_000, 9_000), "txt": "x"}, "9000x9000 pixels, more than the 50000000 allowed"),
    "latin": ({"jpg": jpeg(), "txt": "caf\xe9".encode("latin-1")}, "not UTF-8"),
    "silent": ({"jpg": jpeg()}, "no caption: txt is missing"),
    "blank": ({"jpg": jpeg(), "txt": " \n"}, "caption is empty"),
    "blind": ({"txt": "x", "json": {}}, "no picture: none of jpg, jpeg, png, webp"),
    "script": ({"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "txt": "x"}, "not a picture"),
    "essay": ({"jpg": jpeg(), "txt": b"x" * (2 << 20)}, "member of 2097152 bytes"),
}


def good(key: str) -> dict[str, Any]:
    return {"__key__": key, "jpg": jpeg(), "txt": f"good {key}", "json": b"\xff not json"}


def write_faulty(folder: Path, broken: dict[str, tuple[dict[str, Any], str]]) -> None:
    for number in range(4):
        samples = [good(f"good{number}{i:03d}") for i in range(20)]
        if number == 2:
            samples[5:5] = [{"__key__": key, **members} for key, (members, _) in broken.items()]
        write_shard(folder / f"{number:05d}.tar", samples)
    path = folder / "00003.tar"
    path.write_bytes(path.read_bytes()[: index_shard(path).members(12)["jpg"].offset + 10])
    write_shard(folder / "00004.tar", [])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_listed_and_passed_over(
    tmp_path: Path, damaged_manifest: Callable[[], Manifest], workers: int
) -> None:
    write_faulty(tmp_path, BROKEN)
    manifest = damaged_manifest()
    assert manifest.num_samples == 72 + len(BROKEN)
    skips = SkipLog(tmp_path / "lists" / "skipped.jsonl")
    skips.add_shard_faults(manifest)
    loader = make_loader(manifest, global_batch_size=8, num_workers=workers)
    loaded = take(loader, 12)
    for step in loaded:
        skips.add(step.skipped)
        assert len(step.batch) == 8
        assert step.num_read == 8 + len(step.skipped)
    num_read, num_skipped = sum(step.num_read for step in loaded), sum(len(step.skipped) for step in loaded)
    assert num_read == sum(loader.positions.values()) == 96 + num_skipped
    assert all("/good" in uid for step in loaded for uid in step.batch.uids)  # no uid in the JSON: SHARD/KEY

    rows = [json.loads(line) for line in (tmp_path / "lists" / "skipped.jsonl").read_text().splitlines()]
    faults = {Path(row["shard"]).name: row["reason"] for row in rows if row["key"] is None}
    assert faults.keys() == {"00003.tar", "00004.tar"}
    assert "cut off" in faults["00003.tar"]
    assert faults["00004.tar"] == "holds no sample"
    reasons = {row["key"]: row["reason"] for row in rows if row["key"] is not None}
    assert reasons.keys() == BROKEN.keys()
    for key, (_, reason) in BROKEN.items():
        assert any(part in reasons[key] for part in reason.split("|")), (key, reasons[key])
    for row in rows[2:]:
        assert row["shard"] == str(tmp_path / "00002.tar")
        shard, position = manifest.locate(row["sample_index"])
        assert index_shard(manifest.shards[shard].path).keys[position] == row["key"]


def test_skipping_does_not_depend_on_ranks_and_resumes(
    tmp_path: Path, damaged_manifest: Callable[[], Manifest]
) -> None:
    write_faulty(tmp_path, BROKEN)
    manifest = damaged_manifest()
    whole = take(make_loader(manifest, global_batch_size=8), 12)
    halves = [take(make_loader(manifest, rank=r, world_size=2, global_batch_size=8), 12) for r in range(2)]
    for step, expected in enumerate(whole):
        parts = [half[step] for half in halves]
        assert [uid for part in parts for uid in part.batch.uids] == list(expected.batch.uids)
        assert [skip for part in parts for skip in part.skipped] == expected.skipped
    loader = make_loader(manifest, global_batch_size=8)
    loader.load_positions(whole[6].stream_positions)
    assert [step.batch.uids for step in take(loader, 5)] == [step.batch.uids for step in whole[7:]]


def test_a_caption_that_cannot_be_tokenized_is_listed(
    tmp_path: Path, damaged_manifest: Callable[[], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text is known to do it; one that did would otherwise end the run, and each that goes on from there."""

    def refuses(captions: list[str]) -> Tensor:
        if any("good2003" in text for text in captions):
            raise ValueError("a text of another world")
        return byte_tokenizer(captions)

    write_faulty(tmp_path, {})
    monkeypatch.setattr(data_helpers, "byte_tokenizer", refuses)
    loaded = take(make_loader(damaged_manifest(), global_batch_size=8, max_bad_fraction=1.0), 9)
    assert {(each.key, each.reason) for step in loaded for each in step.skipped} == {
        ("good2003", "caption that cannot be tokenized: a text of another world")
    }


def test_too_many_bad_samples_end_the_run(tmp_path: Path) -> None:
    skips = SkipLog(tmp_path / "skipped.jsonl")
    skips.add([SkippedSample("a.tar", f"k{i}", i, "caption is empty") for i in range(9)])
    skips.add([SkippedSample("b.tar", f"k{i}", i, "cut") for i in range(20)])
    listing = f"listed in {skips.path}"
    check_bad_fraction(8, 2, skips.first, 0.02, listing)  # two of the first eight: too early to judge
    check_bad_fraction(1100, 9, skips.first, 0.02, listing)
    with pytest.raises(TooManyBadSamples) as caught:
        check_bad_fraction(1108, 29, skips.first, 0.02, listing)
    message = str(caught.value)
    for part in (
        "29 of 1108",
        "2.6%",
        "data.max_bad_fraction = 0.02",
        "a.tar k0: caption is empty",
        "skipped.jsonl",
    ):
        assert part in message
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 29


def test_no_bad_sample_is_allowed_at_zero() -> None:
    with pytest.raises(TooManyBadSamples, match="1 of 8"):
        check_bad_fraction(8, 1, [SkippedSample("a.tar", "k", 0, "cut")], 0.0, "listed nowhere")


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_one_usable_sample_ends_instead_of_searching_for_ever(
    clean_manifest: Manifest, workers: int
) -> None:
    loader = make_loader(clean_manifest, caption_key="caption", max_bad_fraction=1.0, num_workers=workers)
    with pytest.raises(TooManyBadSamples, match="caption is missing from the sample") as caught:
        take(loader, 1)
    assert "Traceback" not in str(caught.value)


def test_a_long_run_of_bad_samples_is_judged_by_the_worker(
    clean_manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    damaged_manifest: Callable[[], Manifest],
) -> None:
    monkeypatch.setattr(stream_dataset, "GIVE_UP_AFTER", 5)
    write_shard(tmp_path / "0.tar", [good(f"g{i}") for i in range(100)])
    write_shard(tmp_path / "1.tar", [{"__key__": f"b{i}", "jpg": b"", "txt": "x"} for i in range(100)])
    options: dict[str, Any] = {"num_streams": 1, "global_batch_size": 5, "shuffle_window": 1}
    with pytest.raises(TooManyBadSamples, match=r"data\.max_bad_fraction = 0\.02"):
        take(make_loader(damaged_manifest(), max_bad_fraction=0.02, **options), 30)
    loaded = take(make_loader(damaged_manifest(), max_bad_fraction=0.9, **options), 40)
    assert sum(len(step.skipped) for step in loaded) in (
        100,
        200,
    )  # the last pass may end before its bad shard


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_changes_under_the_run_is_an_error(
    tmp_path: Path, damaged_manifest: Callable[[], Manifest], num_workers: int
) -> None:
    write_shard(tmp_path / "0.tar", [good(f"g{i}") for i in range(20)])
    manifest = damaged_manifest()
    write_shard(tmp_path / "0.tar", [good(f"g{i}") for i in range(19)])
    with pytest.raises(ManifestError, match="must not change during a run") as caught:
        take(make_loader(manifest, num_workers=num_workers), 1)
    assert "Traceback" not in str(caught.value)


def test_many_small_shards_in_one_window_are_indexed_once(
    tmp_path: Path, damaged_manifest: Callable[[], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuclip_scale.data import samples

    for number in range(200):  # more than the files kept open
        write_shard(tmp_path / f"{number:05d}.tar", [good(f"g{i}") for i in range(2)])
    calls: list[str] = []

    def counting(path: str) -> ShardIndex:
        calls.append(path)
        return index_shard(path)

    monkeypatch.setattr(samples, "index_shard", counting)
    take(make_loader(damaged_manifest(), shuffle_window=1000, global_batch_size=400), 1)
    assert len(calls) == len(set(calls)) == 200


class AbortsAtExit(IterableDataset[int]):
    """Leaves its worker as C++ libraries may: taking the process down normally aborts it."""

    def __iter__(self) -> Iterator[int]:
        atexit.register(os.abort)
        yield from range(3)


def test_spawned_workers_end_without_what_a_program_does_at_its_end() -> None:
    loader = DataLoader(
        AbortsAtExit(), batch_size=None, num_workers=1, multiprocessing_context="spawn", worker_init_fn=init_worker
    )
    chunks = iter(loader)
    (worker,) = chunks._workers  # type: ignore[attr-defined]
    assert list(chunks) == [0, 1, 2]
    worker.join(60)
    assert worker.exitcode == 0
