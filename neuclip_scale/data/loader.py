"""The training loader: canonical streams, decoded by workers, joined into this rank's share of a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from neuclip_scale.config import DataConfig
from neuclip_scale.data.batch import Batch, join_batches
from neuclip_scale.data.epochs import Sums, joined
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.mixing import create_order
from neuclip_scale.data.shards import storage
from neuclip_scale.data.skips import SkippedSample
from neuclip_scale.data.stall import DataStall, StallWatch
from neuclip_scale.data.stream_dataset import (
    FINAL_ERRORS,
    Chunk,
    ChunkOrError,
    StreamDataset,
    Tokenizer,
    Transform,
    init_worker,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedBatch:
    """This rank's share of one global batch, and where the streams stand after it."""

    batch: Batch
    stream_positions: dict[int, int]
    """Next position of each of this rank's streams; all ranks' together resume a run."""
    stream_digests: Tensor  # [num_streams / world_size] int64, of uids, see data.digest
    content_digests: Tensor  # the same of what was read
    skipped: list[SkippedSample]
    num_read: int
    """Samples read for this batch, the skipped ones included."""
    epochs: dict[int, Sums] = field(default_factory=dict)
    """What was read of each epoch, see `data.epochs`; empty where the order has none."""

    @property
    def stream_marks(self) -> Tensor:
        """[num_streams / world_size, 3] int64: each stream's digests and its next position."""
        positions = torch.tensor(list(self.stream_positions.values()))
        return torch.stack([self.stream_digests, self.content_digests, positions], dim=1)


class TrainLoader:
    """Endless batches whose content depends on the data, the seed and the step, never on ranks or workers.

    Of each global batch every stream gives global_batch_size / num_streams usable samples, in stream order;
    rank r owns the r-th contiguous part of the streams and its workers share those. A new iteration goes on
    where the last batch of the previous one ended.
    """

    def __init__(
        self,
        manifest: Manifest,
        section: DataConfig,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        transform: Transform,
        tokenizer: Tokenizer,
        pin_memory: bool = False,
    ) -> None:
        """`transform` and `tokenizer` must be picklable. Raises ValueError for shares that are not whole."""
        num_streams = section.num_streams
        if num_streams % world_size or global_batch_size % num_streams:
            raise ValueError(
                f"data.num_streams = {num_streams} must be a multiple of the {world_size} rank(s) and divide "
                f"train.global_batch_size = {global_batch_size}."
            )
        per_rank = num_streams // world_size
        self.streams = range(rank * per_rank, (rank + 1) * per_rank)
        self.positions = dict.fromkeys(self.streams, 0)
        self.num_workers = min(section.num_workers, per_rank)
        if self.num_workers < section.num_workers and rank == 0:
            logger.warning(
                "data.num_workers = %d: a rank has only %d stream(s), so %d worker(s) are started; raise "
                "data.num_streams for more",
                section.num_workers,
                per_rank,
                self.num_workers,
            )
        self._section, self._manifest, self._seed = section, manifest, seed
        self._num_read = 0
        self._global_batch_size = global_batch_size
        self._transform, self._tokenizer, self._pin_memory = transform, tokenizer, pin_memory
        self.order = create_order(manifest, section, seed)
        self._watch = StallWatch(manifest, rank, self.num_workers, section.stall_warning_seconds)

    def load_positions(self, positions: Mapping[int, int] | Sequence[int], *, num_read: int = 0) -> None:
        """Continue from these positions, by stream; a sequence holds those of ALL streams of the run.

        `num_read` samples of all ranks were read before. Nothing before the positions is read. Takes effect at the
        next iteration. Raises ValueError for another number of streams, a stream of this rank that is missing, or a
        negative position.
        """
        if not isinstance(positions, Mapping):
            if len(positions) != self._section.num_streams:
                raise ValueError(
                    f"{len(positions)} stream positions for data.num_streams = {self._section.num_streams}: "
                    "a run resumes with the number of streams it began with."
                )
            positions = dict(enumerate(positions))
        wrong = [stream for stream in self.streams if positions.get(stream, -1) < 0]
        if wrong:
            raise ValueError(f"no valid position for stream(s) {wrong}: the checkpoint does not fit this run.")
        self.positions = {stream: int(positions[stream]) for stream in self.streams}
        self._num_read = num_read

    def __iter__(self) -> Iterator[LoadedBatch]:
        chunks = iter(self._data_loader())
        with self._watch.running():
            while True:
                # DataLoader asks its workers in turn, so one round is one step.
                loaded = self._join([self._next_chunk(chunks, worker) for worker in range(max(1, self.num_workers))])
                assert list(loaded.stream_positions) == list(self.streams)
                self.positions = dict(loaded.stream_positions)
                yield loaded

    def _join(self, parts: list[Chunk]) -> LoadedBatch:
        return LoadedBatch(
            batch=join_batches([part.batch for part in parts], pin_memory=self._pin_memory),
            stream_positions={k: v for part in parts for k, v in part.positions.items()},
            stream_digests=torch.tensor([digest for part in parts for digest in part.digests]),
            content_digests=torch.tensor([digest for part in parts for digest in part.contents]),
            skipped=[sample for part in parts for sample in part.skipped],
            num_read=sum(part.num_read for part in parts),
            epochs=joined(part.epochs for part in parts),
        )

    def _data_loader(self) -> DataLoader[ChunkOrError]:
        dataset = StreamDataset(
            self._manifest,
            self.order,
            self._section,
            samples_per_stream=self._global_batch_size // self._section.num_streams,
            positions=dict(self.positions),
            num_read=self._num_read,
            seed=self._seed,
            transform=self._transform,
            tokenizer=self._tokenizer,
            reading=self._watch.reading,
        )
        workers = self.num_workers
        has_remote = any(storage.is_remote(shard.path) for shard in self._manifest.shards)
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._section.prefetch_batches if workers else None,
            collate_fn=_unchanged,
            worker_init_fn=init_worker,
            timeout=self._section.stall_timeout_seconds if workers else 0,
            # Clients of object stores have threads and locks of their own, which a fork would copy half.
            multiprocessing_context="spawn" if workers and has_remote else None,
        )

    def _next_chunk(self, chunks: Iterator[ChunkOrError], worker: int) -> Chunk:
        began = time.monotonic()
        try:
            with self._watch.waiting(worker):
                chunk = next(chunks)
        except (EOFError, ConnectionError) as error:
            # Its tensors were on their way; a moment later torch's SIGCHLD handler raises and names the worker.
            time.sleep(2)
            raise RuntimeError("a DataLoader worker ended while it was sending a batch") from error
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            told = self._watch.describe(worker, time.monotonic() - began)
            raise DataStall(
                f"{told}: longer than data.stall_timeout_seconds = {self._section.stall_timeout_seconds:g}. "
                "Mend the storage and run again: the run goes on from its last checkpoint."
            ) from error
        if isinstance(chunk, FINAL_ERRORS):
            raise chunk
        return chunk


def _unchanged(chunk: Any) -> Any:
    return chunk
