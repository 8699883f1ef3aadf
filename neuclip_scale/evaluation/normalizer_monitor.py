"""How wrong the log-normalizers of a training step are, measured while training goes on undisturbed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.config import DataConfig
from neuclip_scale.data.indexed import IndexedSamples, indexed_batches
from neuclip_scale.data.manifest import Manifest
from neuclip_scale.data.stream_dataset import Tokenizer
from neuclip_scale.evaluation.normalizer_error import error_statistics, exact_log_normalizers
from neuclip_scale.models.clip import CLIP
from neuclip_scale.objectives import ObjectiveOutput
from neuclip_scale.similarity import PairFeatures

if TYPE_CHECKING:
    from neuclip_scale.engines import Engine


class NormalizerMonitor:
    """Holds a step's estimates against the exact values over the training set.

    The anchors are rank 0's pairs of the step as the objective saw them. The truth is log(eps + g) with g over all
    other reference pairs, encoded with the same weights in evaluation mode, without augmentation. The reference is
    the whole training set, or `num_reference` pairs drawn once by the seed.
    """

    def __init__(
        self,
        manifest: Manifest,
        section: DataConfig,
        *,
        every_steps: int,
        num_reference: int,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        eps: float,
    ) -> None:
        self.every_steps = every_steps
        self.eps = eps
        self._section, self._tokenizer, self._batch_size = section, tokenizer, batch_size
        total = manifest.num_samples
        indices = np.arange(total)
        if 0 < num_reference < total:
            indices = np.sort(np.random.default_rng(seed).choice(total, num_reference, replace=False))
        self._samples = IndexedSamples(manifest, section, indices.tolist(), transform)
        self.on_exact: Callable[[Tensor, ObjectiveOutput], None] = lambda exact, output: None
        """Called with the exact values [b, 2] of each measurement, for studies that watch several estimators."""
        self._result: dict[str, Any] = {}

    def is_due(self, step: int) -> bool:
        """Whether `step` (1-based) is to be measured; the first step is."""
        return self.every_steps > 0 and (step == 1 or step % self.every_steps == 0)

    def measure(
        self, engine: Engine, pairs: PairFeatures, logit_scale: Tensor, output: ObjectiveOutput, sample_index: Tensor
    ) -> None:
        """Measure this step's estimates before the weights move (collective: rank 0 works, the others wait)."""
        if output.normalizers is None:  # siglip
            return
        began = time.perf_counter()
        self._result = distributed.on_main(lambda: self._measure(engine, pairs, logit_scale, output, sample_index))
        self._result["normalizer/seconds"] = time.perf_counter() - began

    def take_result(self) -> dict[str, Any]:
        """The last measurement for the log, once; empty where there is none."""
        result, self._result = self._result, {}
        return result

    @torch.no_grad()
    def _measure(
        self, engine: Engine, pairs: PairFeatures, logit_scale: Tensor, output: ObjectiveOutput, sample_index: Tensor
    ) -> dict[str, Any]:
        image, text, index = self._encode_reference(engine.module, engine)
        places = torch.searchsorted(index, sample_index).clamp_max(len(index) - 1)
        # -1: not in the reference, so nothing to leave out
        places = torch.where(index[places] == sample_index, places, -1)
        normalizers = output.normalizers
        assert normalizers is not None
        tau = 1 / logit_scale if normalizers.temperatures is None else normalizers.temperatures
        exact = torch.stack(
            exact_log_normalizers(pairs.image, pairs.text, places, image, text, tau, eps=self.eps), 1
        )  # [b, 2]
        self.on_exact(exact, output)
        result: dict[str, Any] = {"normalizer/num_reference": len(index)}
        for suffix, rows in (("", normalizers.estimates), ("_batch", normalizers.batch_rows)):
            for name, value in error_statistics(rows, exact).items():
                result[f"normalizer/{name}{suffix}"] = value
        return result

    def _encode_reference(self, model: CLIP, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
        """Features [n, d] of both sides and sample indices [n]."""
        images, texts, indices = [], [], []
        model.eval()
        batches = indexed_batches(
            self._samples, self._tokenizer, batch_size=self._batch_size, num_workers=self._section.num_workers
        )
        for batch in batches:
            moved = batch.to(engine.device)
            with engine.autocast():
                encoded = model(moved.images, moved.tokens)
            images.append(encoded.image_features)
            texts.append(encoded.text_features)
            indices.append(moved.sample_index)
        model.train()
        return torch.cat(images), torch.cat(texts), torch.cat(indices)
