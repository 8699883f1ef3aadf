"""Pairs of the training set encoded as the encoders stand: what exact normalizers are means over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from neuclip_scale.config import DataConfig
from neuclip_scale.data.batch import Batch
from neuclip_scale.data.indexed import IndexedSamples, indexed_batches
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.stream_dataset import Tokenizer
from neuclip_scale.data.transforms import EvalTransform, TrainTransform
from neuclip_scale.normalizers import DatasetFeatures

if TYPE_CHECKING:
    from neuclip_scale.engines import Engine
from neuclip_scale.engines.base import inputs

KEEP_UP_TO = 1 << 28
"""Bytes of decoded pictures that stay in memory rather than be decoded again."""


class ReferencePairs:
    """The whole training set, or `num_reference` pairs of it drawn once by the seed.

    With the transform of training, the normalizer is that of the loss that is trained: the mean over other pairs as
    training sees them, cut anew each time. The seed cuts each pair once, which over many pairs makes no difference.
    """

    def __init__(
        self,
        manifest: Manifest,
        section: DataConfig,
        *,
        num_reference: int,
        transform: TrainTransform | EvalTransform,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        always_keep: bool = False,
    ) -> None:
        """Decoded pairs stay in memory after the first time if they are small together, or with `always_keep`."""
        total = manifest.num_samples
        indices = np.arange(total)
        if 0 < num_reference < total:
            indices = np.sort(np.random.default_rng(seed).choice(total, num_reference, replace=False))
        self._samples = IndexedSamples(manifest, section, indices.tolist(), transform, seed=seed)
        self._tokenizer, self._batch_size, self._num_workers = tokenizer, batch_size, section.num_workers
        pictures = 3 * 4 * transform.image_size**2 * len(indices)
        self._keep, self._kept = always_keep or pictures <= KEEP_UP_TO, list[Batch]()

    @torch.no_grad()
    def encode(self, engine: Engine) -> DatasetFeatures:
        """Features in evaluation mode; the model is left in training mode. Pairs that cannot be read are left out."""
        model = engine.module
        images, texts, indices = [], [], []
        batches = self._kept or indexed_batches(
            self._samples, self._tokenizer, batch_size=self._batch_size, num_workers=self._num_workers
        )
        read = []
        model.eval()
        for batch in batches:
            if self._keep:
                read.append(batch)
            moved = batch.to(engine.device).packed(model)
            with engine.autocast(), model.compiling_nothing_new():
                encoded = model(*inputs(moved, "both"))
            images.append(encoded.image_features)
            texts.append(encoded.text_features)
            indices.append(moved.sample_index)
        model.train()
        self._kept = read
        return DatasetFeatures(torch.cat(images), torch.cat(texts), torch.cat(indices))
