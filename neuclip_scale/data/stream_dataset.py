"""What runs in a worker process: read, decode and tokenize its share of the streams, step by step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from neuclip_scale.config import DataConfig
from neuclip_scale.data.batch import Batch, caption_lengths
from neuclip_scale.data.cache import ShardCache, cache_of
from neuclip_scale.data.captions import Captions
from neuclip_scale.data.digest import content_of, contents_digest, uids_digest
from neuclip_scale.data.epochs import EpochLedger, Sums
from neuclip_scale.data.look_ahead import LookAhead
from neuclip_scale.data.manifest import Manifest, ManifestError
from neuclip_scale.data.mixing import MixedOrder
from neuclip_scale.data.normalization import Normalization
from neuclip_scale.data.pictures import log_decoder, open_picture
from neuclip_scale.data.samples import SampleReader, UnusableSample
from neuclip_scale.data.skips import SkippedSample, TooManyBadSamples, check_bad_fraction
from neuclip_scale.data.streams import StreamOrder
from neuclip_scale.data.transforms import ImageError, TrainTransform
from neuclip_scale.data.worker_memory import MemoryLimit, WorkerMemoryError

Transform = Callable[[Any, np.random.Generator], Tensor]
"""Of an RGB `Image` or a `Picture`."""
Tokenizer = Callable[[list[str]], Tensor]

GIVE_UP_AFTER = 1000
"""Unusable samples in a row after which a worker applies max_bad_fraction itself, lest it search for ever."""

_AUGMENTATION = 3  # first word of the seed; data.streams uses others


@dataclass
class Chunk:
    """One step's samples of one worker's streams, in stream order."""

    batch: Batch
    positions: dict[int, int]
    """Next position of each stream."""
    digests: list[int]
    """Of the uids of each stream."""
    contents: list[int]
    """Of what was read of each stream."""
    skipped: list[SkippedSample]
    num_read: int
    epochs: dict[int, Sums]
    """What was read of each epoch; empty where the order has none."""


FINAL_ERRORS = (TooManyBadSamples, ManifestError, WorkerMemoryError)
"""What a worker sends as its last item: raised there, they would reach the user with the worker's traceback."""
ChunkOrError = Chunk | TooManyBadSamples | ManifestError | WorkerMemoryError


@dataclass
class _Rows:
    """Samples gathered for a chunk."""

    images: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    sample_index: list[int] = field(default_factory=list)
    uids: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    num_read: int = 0
    epochs: EpochLedger = field(default_factory=EpochLedger)


class StreamDataset(IterableDataset[ChunkOrError]):
    """Endless chunks; worker w of n reads the w-th contiguous part of the streams in `positions`."""

    def __init__(
        self,
        manifest: Manifest,
        order: StreamOrder | MixedOrder,
        section: DataConfig,
        *,
        samples_per_stream: int,
        positions: dict[int, int],
        num_read: int,
        seed: int,
        transform: Transform,
        tokenizer: Tokenizer,
        reading: Tensor,
    ) -> None:
        """`reading` [num_workers] int64, in shared memory: each worker tells there which shard it reads."""
        self._manifest, self._order, self._section = manifest, order, section
        self._reading = reading
        self._samples_per_stream = samples_per_stream
        self._positions = positions
        self._num_read = num_read
        self._seed = seed % (1 << 64)
        self._tokenizer = tokenizer
        self._transform: Transform = transform
        self._normalization: Normalization | None = None
        if isinstance(transform, TrainTransform):  # bytes leave the worker; join_batches or `to` makes floats of them
            self._transform, self._normalization = transform.pixels, transform.normalization
        if 0 in positions:  # the first rank's
            log_decoder(section.decoder)

    def __iter__(self) -> Iterator[ChunkOrError]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        streams = sorted(self._positions)
        streams = streams[len(streams) * worker // num_workers : len(streams) * (worker + 1) // num_workers]
        positions = {stream: self._positions[stream] for stream in streams}
        walks = {stream: self._order.walk(stream, positions[stream]) for stream in streams}
        cache = cache_of(self._section)
        reader = self._reader(len(streams), cache)
        self._told = self._reading[worker : worker + 1]
        ahead = LookAhead(self._manifest, self._order, cache, self._section.shuffle_window)
        memory = MemoryLimit(self._section.max_worker_memory_gib if info else 0, reader.drop_caches)
        num_read_before = self._num_read
        try:
            while True:
                rows, digests, contents = _Rows(), [], []
                ahead.look(positions)
                for stream in streams:
                    first = len(rows.uids)
                    positions[stream] = self._gather(
                        rows, reader, stream, positions[stream], walks[stream], num_read_before
                    )
                    digests.append(uids_digest(rows.uids[first:]))
                    contents.append(contents_digest(rows.contents[first:]))
                num_read_before += self._samples_per_stream * self._order.num_streams
                memory.check(f"reading streams {streams[0]} to {streams[-1]}")
                # No name for the batch here: this frame would keep it while the step is trained.
                yield Chunk(
                    self._batch(rows), dict(positions), digests, contents, rows.skipped, rows.num_read, rows.epochs.open
                )
        except FINAL_ERRORS as error:
            yield error
        finally:
            ahead.close()

    def _reader(self, num_streams: int, cache: ShardCache) -> SampleReader:
        # A window of every stream stays indexed, with the shards that it only grazes.
        longest = max(shard.num_samples for shard in self._manifest.shards)
        return SampleReader(
            self._manifest,
            image_keys=self._section.image_keys,
            captions=Captions.of(self._section),
            max_cached_samples=num_streams * (self._section.shuffle_window + 2 * longest),
            cache=cache,
        )

    def _gather(
        self,
        rows: _Rows,
        reader: SampleReader,
        stream: int,
        position: int,
        walk: Iterator[int],
        num_read_before: int,
    ) -> int:
        """Add this step's usable samples of `stream` to `rows`; returns the position after the last one."""
        wanted, bad_run = len(rows.uids) + self._samples_per_stream, 0
        while len(rows.uids) < wanted:
            sample_index = next(walk)
            rows.num_read += 1
            if self._order.whole_epochs:
                rows.epochs.add(self._order.epoch_of(stream, position), sample_index)
            self._told[0] = self._manifest.locate(sample_index)[0]
            try:
                self._read(rows, reader, stream, position, sample_index)
                bad_run = 0
            except (UnusableSample, ImageError) as error:
                rows.skipped.append(SkippedSample(*reader.name(sample_index), sample_index, str(error)))
                bad_run += 1
                self._check_run(rows, stream, bad_run, num_read_before)
            position += 1
        return position

    def _read(self, rows: _Rows, reader: SampleReader, stream: int, position: int, sample_index: int) -> None:
        raw = reader.read(sample_index, (self._seed, stream, position))
        image = open_picture(raw.image, self._section.max_image_pixels, self._section.decoder)
        seed = np.random.SeedSequence((_AUGMENTATION, self._seed, stream, position))
        pixels = self._transform(image, np.random.Generator(np.random.PCG64(seed)))
        try:  # here and not for the whole step, where nothing would say whose caption it was
            tokens = self._tokenizer([raw.caption])
        except ValueError as error:
            raise UnusableSample(f"caption that cannot be tokenized: {error}") from error
        rows.images.append(pixels)
        rows.tokens.append(tokens)
        rows.sample_index.append(sample_index)
        rows.uids.append(raw.uid)
        rows.contents.append(content_of(raw.image, raw.caption))

    def _check_run(self, rows: _Rows, stream: int, bad_run: int, num_read_before: int) -> None:
        bad = rows.skipped[-bad_run:]
        length = self._order.length(stream)
        if bad_run >= 2 * length:  # so a whole pass lies within the run
            raise TooManyBadSamples(
                f"stream {stream}: not one of {bad_run} samples in a row could be used, twice its length. "
                f"Check data.image_keys and data.caption_key or data.captions. The first one: {bad[0]}"
            )
        if bad_run >= GIVE_UP_AFTER:
            # Samples of all ranks count as read and only these as bad, so this never stops a run too early.
            num_read, limit = num_read_before + rows.num_read, self._section.max_bad_fraction
            check_bad_fraction(num_read, bad_run, bad, limit, "in the shards named")

    def _batch(self, rows: _Rows) -> Batch:
        tokens = torch.cat(rows.tokens).to(torch.int64)
        images, indices = torch.stack(rows.images), torch.tensor(rows.sample_index)
        return Batch(images, tokens, indices, tuple(rows.uids), self._normalization, caption_lengths(tokens))


def init_worker(worker: int) -> None:
    """Leave signals to the training process: Slurm and Ctrl-C send theirs to the workers too.

    SIGTERM ends a worker only when it comes from that process, which may still have a step to finish. From
    there it must end it: at exit Python sends it to the workers that are left and waits for them.
    """
    Finalize(None, _end, exitpriority=-100)  # after the queue's own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end() -> None:
    """End at once, with no more than a forked worker has at its end. A spawned one would end as a program: threads of
    storage clients and of C++ libraries that still run meet what is being taken down, and one in twenty aborted.
    """
    if sys.exc_info()[0] is None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
