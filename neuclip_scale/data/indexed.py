"""Chosen samples of the training set, in order: for measurements on the training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neuclip_scale.config import DataConfig
from neuclip_scale.data.batch import Batch, caption_lengths
from neuclip_scale.data.cache import cache_of
from neuclip_scale.data.captions import Captions
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.pictures import open_picture
from neuclip_scale.data.samples import SampleReader, UnusableSample
from neuclip_scale.data.stream_dataset import Tokenizer, init_worker
from neuclip_scale.data.transforms import EvalTransform, ImageError, TrainTransform, decode_image

Row = tuple[Tensor, str, int, str]
CACHED_SAMPLES = 100_000


class IndexedSamples(Dataset[Row | None]):
    """Samples by position in `sample_indices`; unusable ones are None."""

    def __init__(
        self,
        manifest: Manifest,
        section: DataConfig,
        sample_indices: Sequence[int],
        transform: TrainTransform | EvalTransform,
        *,
        seed: int = 0,
    ) -> None:
        """What `transform` draws is fixed by `seed` and the sample, the same each time it is read."""
        self._manifest, self._section, self._seed = manifest, section, seed
        self._sample_indices, self._transform = sample_indices, transform
        self._reader: SampleReader | None = None

    def __len__(self) -> int:
        return len(self._sample_indices)

    def __getitem__(self, position: int) -> Row | None:
        if self._reader is None:  # in the worker: open files do not travel
            self._reader = SampleReader(
                self._manifest,
                image_keys=self._section.image_keys,
                captions=Captions.of(self._section),
                max_cached_samples=CACHED_SAMPLES,
                cache=cache_of(self._section),
            )
        sample_index = self._sample_indices[position]
        try:
            raw = self._reader.read(sample_index, (self._seed, sample_index))
            image = self._image(raw.image, np.random.default_rng((self._seed, sample_index)))
        except (UnusableSample, ImageError):
            return None
        return image, raw.caption, sample_index, raw.uid

    def _image(self, data: bytes, generator: np.random.Generator) -> Tensor:
        limit = self._section.max_image_pixels
        if isinstance(self._transform, EvalTransform):
            return self._transform(decode_image(data, limit))
        return self._transform(open_picture(data, limit, self._section.decoder), generator)


def indexed_batches(
    samples: IndexedSamples, tokenizer: Tokenizer, *, batch_size: int, num_workers: int
) -> Iterator[Batch]:
    """Batches of the usable samples, in order; a batch may be smaller where samples could not be used."""
    loader = DataLoader(
        samples,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(_collate, tokenizer),
        worker_init_fn=init_worker,
    )
    yield from (batch for batch in loader if batch is not None)


def _collate(tokenizer: Tokenizer, rows: list[Row | None]) -> Batch | None:
    usable = [row for row in rows if row is not None]
    if not usable:
        return None
    images, captions, indices, uids = zip(*usable, strict=True)
    tokens = tokenizer(list(captions))
    return Batch(torch.stack(images), tokens, torch.tensor(indices), tuple(uids), text_lengths=caption_lengths(tokens))
