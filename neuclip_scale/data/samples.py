"""Reading one sample of the training set by its dense index: picture bytes, caption and uid."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from neuclip_scale.data.cache import ShardCache
from neuclip_scale.data.captions import Captions, Members, NoCaption
from neuclip_scale.data.manifest import Manifest, ManifestError, ShardEntry
from neuclip_scale.data.shards import MemberSpan, ShardError, ShardIndex, index_shard, read_member, storage

MAX_TEXT_BYTES = 1 << 20
"""Larger captions and JSON members are refused."""

_MAX_OPEN_FILES = 128  # of one process; 1024 is a common limit, and torch needs some to share tensors
_LOST_SECONDS = 900.0
_EVICTIONS = 3  # of one shard, each just when it was to be opened
_UID = re.compile(r"[0-9a-fA-F]{32}")


T = TypeVar("T")


class UnusableSample(ValueError):  # noqa: N818 - it is no fault of the program
    """A sample that cannot be trained on; the message is the reason, in one line."""


@dataclass(frozen=True)
class RawSample:
    """One pair as it stands in the shard."""

    image: bytes
    caption: str
    uid: str
    """The 32 hex digits `uid` of the sample's JSON where there is one, else SHARDNAME/KEY."""


class SampleReader:
    """Random access to the samples of a manifest; shard indices are made on first use and the oldest dropped.

    Remote shards are fetched into `cache`. A shard that cannot be read, after all attempts, makes its samples
    unusable, and is tried again after a quarter of an hour. Not for use by several threads. `max_cached_samples`
    bounds the memory: about 150 bytes for each.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        image_keys: tuple[str, ...],
        captions: Captions,
        max_cached_samples: int,
        cache: ShardCache,
    ) -> None:
        self._manifest, self._cache = manifest, cache
        self._lost: dict[int, tuple[float, str]] = {}
        self._image_keys = tuple(key.lower() for key in image_keys)
        self._captions = captions
        self._max_cached_samples = max_cached_samples
        self._cached_samples = 0
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    def name(self, sample_index: int) -> tuple[str, str]:
        """(path of the shard, key); the key is `#position` where the shard cannot be read."""
        shard, position = self._manifest.locate(sample_index)
        index = self._indices.get(shard)
        return self._manifest.shards[shard].path, index.keys[position] if index else f"#{position}"

    def read(self, sample_index: int, caption_seed: Sequence[int] = (0,)) -> RawSample:
        """`caption_seed` fixes what is drawn among several captions.

        Raises `UnusableSample`, and `ManifestError` when the shard is not what the manifest says.
        """
        shard, _ = self._manifest.locate(sample_index)
        until, reason = self._lost.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise UnusableSample(reason)
        path = self._manifest.shards[shard].path
        try:
            return storage.retried(lambda: self._attempt(shard, sample_index, caption_seed), path)
        except storage.StorageError as error:
            self._lost[shard] = time.monotonic() + _LOST_SECONDS, str(error)
            raise UnusableSample(str(error)) from error

    def _attempt(self, shard: int, sample_index: int, caption_seed: Sequence[int]) -> RawSample:
        try:
            return self._read(sample_index, caption_seed)
        except (OSError, storage.StorageError):  # opened anew at the next attempt
            if shard in self._files:
                os.close(self._files.pop(shard))
            self._forget_index(shard)
            raise

    def _read(self, sample_index: int, caption_seed: Sequence[int]) -> RawSample:
        shard, position = self._manifest.locate(sample_index)
        index, descriptor = self._index(shard), self._file(shard)
        members = index.members(position)
        image = next((members[key] for key in self._image_keys if key in members), None)
        if image is None:
            raise UnusableSample(f"no picture: none of {', '.join(self._image_keys)} in the sample")
        try:
            texts = Members(lambda key: _text(descriptor, members.get(key)))
            caption = self._captions.choose(texts, caption_seed)
            uid = _uid(texts)
            data = read_member(descriptor, image)
        except (ShardError, NoCaption) as error:
            raise UnusableSample(str(error)) from error
        name = Path(storage.base_name(self._manifest.shards[shard].path)).stem
        return RawSample(data, caption, uid or f"{name}/{index.keys[position]}")

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def drop_caches(self) -> None:
        """Forget the shard indices and close the shards; reading makes them anew."""
        self._indices.clear()
        self._cached_samples = 0
        self.close()

    def __del__(self) -> None:
        self.close()

    def _index(self, shard: int) -> ShardIndex:
        if shard in self._indices:
            self._indices.move_to_end(shard)
            return self._indices[shard]
        entry = self._manifest.shards[shard]
        index = self._opened(entry, index_shard)
        if (index.num_samples, index.num_bytes) != (entry.num_samples, entry.num_bytes):
            raise ManifestError(
                f"shard {entry.path}: {index.num_samples} samples in {index.num_bytes} bytes, but "
                f"{entry.num_samples} in {entry.num_bytes} when training "
                "began. Shards must not change during a run."
            )
        self._indices[shard] = index
        self._cached_samples += index.num_samples
        while self._cached_samples > self._max_cached_samples and len(self._indices) > 1:
            self._cached_samples -= self._indices.popitem(last=False)[1].num_samples
        return index

    def _opened(self, entry: ShardEntry, use: Callable[[str], T]) -> T:
        """What `use` makes of the shard's path; fetched again where another process made room of it just now."""
        for _ in range(_EVICTIONS if storage.is_remote(entry.path) else 0):
            with contextlib.suppress(FileNotFoundError):
                return use(self._cache.local(entry.path, entry.version))
        return use(self._cache.local(entry.path, entry.version))

    def _forget_index(self, shard: int) -> None:
        index = self._indices.pop(shard, None)
        self._cached_samples -= index.num_samples if index else 0

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            entry = self._manifest.shards[shard]
            self._files[shard] = self._opened(entry, lambda path: os.open(path, os.O_RDONLY))
            if len(self._files) > _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]


def _text(descriptor: int, span: MemberSpan | None) -> bytes | None:
    return None if span is None else read_member(descriptor, span, max_bytes=MAX_TEXT_BYTES)


def _uid(texts: Members) -> str | None:
    try:
        document = texts.document("json")
    except (NoCaption, ShardError):  # no JSON, or too large: for the name it is not needed
        return None
    uid = document.get("uid") if isinstance(document, dict) else None
    return uid if isinstance(uid, str) and _UID.fullmatch(uid) else None
