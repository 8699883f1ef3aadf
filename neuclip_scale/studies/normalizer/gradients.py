"""Bias and variance of the encoders' gradient under each estimator, against the gradient over all pairs.

At one frozen model, K batches from where training would go on: each estimator turns a batch into normalizers, and
those into a gradient of the encoders' parameters. The truth is the gradient of RGCL-g over the whole training set as
one batch with its exact normalizers, from the same augmented-free encodings. For an estimator with gradients h_k,

    bias^2 = (|mean_k h_k - h|^2 - variance / K) / |h|^2,  without what the mean of K draws adds; as often below 0 as
             above where there is no bias, so roots are taken of means over seeds
    noise = sqrt(variance) / |h|,  variance = mean_k |h_k - mean|^2 K/(K-1)
    cosine = <mean_k h_k, h> / (|mean_k h_k| |h|)
    share = (sum_i v_i)^2 / (B sum_i v_i^2), v_i the weight exp(-a_i) g_i of anchor i: 1 if all anchors count alike

Every batch is drawn anew from all n pairs: the K gradients are then independent, variance / K is exact, and the exact
normalizers have no bias. Parts of one epoch would add between (1 - K B / n) variance / K, which holds for sums
over anchors, and variance / K; a batch's gradient is a sum over pairs of pairs, most of which no part of an epoch has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuclip_scale.config import ConfigError
from neuclip_scale.data.indexed import IndexedSamples, indexed_batches
from neuclip_scale.models.clip import SCALARS, CLIPOutput, joined_projections
from neuclip_scale.normalizers import batch_log_normalizers
from neuclip_scale.normalizers.exact import exact_log_normalizers
from neuclip_scale.objectives.base import margin_gradients
from neuclip_scale.similarity import PairFeatures
from neuclip_scale.studies.normalizer.watching import Watcher, estimates, fork
from neuclip_scale.trainer import Trainer

CHUNK = 256


@dataclass(frozen=True)
class GradientProbe:
    """Measures every watcher's gradient with `num_batches` batches when training is done."""

    num_batches: int
    batch: int
    seed: int
    eps: float = 1e-6

    def check(self, num_samples: int) -> None:
        """Before the training: raise `ConfigError` where there would be no two batches, which a spread takes."""
        if min(self.num_batches, num_samples // self.batch) < 2:
            raise ConfigError(
                "gradient_batches",
                self.num_batches,
                f"a gradient's bias and noise take two batches, and {num_samples} samples have "
                f"{num_samples // self.batch} of {self.batch}",
                "Give 2 or more, smaller --batches or more --shards; 0 leaves the gradients out.",
            )

    def __call__(self, trainer: Trainer, watchers: list[Watcher]) -> list[dict[str, Any]]:
        """One row for each estimator and one for the exact normalizers."""
        model = trainer.engine.module
        model.eval()  # no dropout: one function for batches and truth
        data = _Pairs(trainer)
        scale = model.logit_scale.detach().exp()
        exact = _exact_rows(data, scale, self.eps)
        truth = _flat(data.gradient(PairFeatures.single(data.image, data.text), scale, exact, range(len(data))))
        sums: dict[str, _Moments] = {w.label: _Moments() for w in watchers} | {"exact": _Moments()}
        generator = torch.Generator().manual_seed(self.seed)
        objectives = {w.label: w.objective for w in watchers}
        for _ in range(self.num_batches):
            picked = torch.randperm(len(data), generator=generator)[: self.batch].tolist()
            pairs = data.pairs(picked)
            g = torch.stack(batch_log_normalizers(pairs, scale, tile_size=1024), 1)
            rows = {label: self._estimate(o, pairs, scale, data.index[picked]) for label, o in objectives.items()}
            for label, a in {**rows, "exact": exact[picked]}.items():
                sums[label].add(_flat(data.gradient(pairs, scale, a, picked)), (g - a).exp())
        return [{"estimator": label, **moments.row(truth)} for label, moments in sums.items()]

    @staticmethod
    def _estimate(objective: Any, pairs: PairFeatures, scale: Tensor, index: Tensor) -> Tensor:
        copied = fork(objective)
        copied.train()
        return estimates(copied(pairs, scale, index))


class _Pairs:
    """The whole training set: its features, and parameter gradients through its encoders."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model = trainer, trainer.engine.module
        samples = IndexedSamples(
            trainer.manifest, trainer.config.data, list(range(trainer.manifest.num_samples)), trainer.eval_transform
        )
        batches = list(indexed_batches(samples, trainer.tokenizer, batch_size=CHUNK, num_workers=1))
        self.images = torch.cat([batch.images for batch in batches])
        self.tokens = torch.cat([batch.tokens for batch in batches])
        self.index = torch.cat([batch.sample_index for batch in batches]).to(trainer.device)
        with torch.no_grad():
            outputs = [self._encode(chunk) for chunk in self._chunks(range(len(self)))]
        images, texts = zip(*(output.both() for output in outputs), strict=True)
        self.image, self.text = torch.cat(images), torch.cat(texts)
        self.projections = joined_projections(outputs)

    def __len__(self) -> int:
        return len(self.index)

    def _chunks(self, rows: Any) -> Iterator[list[int]]:
        listed = list(rows)
        yield from (listed[first : first + CHUNK] for first in range(0, len(listed), CHUNK))

    def pairs(self, rows: list[int]) -> PairFeatures:
        """Some of the pairs as a batch."""
        pairs = PairFeatures.single(self.image[rows], self.text[rows])
        if self.projections is None:
            return pairs
        image, text = (each._replace(inputs=each.inputs[rows]) for each in self.projections)
        return replace(pairs, projections=(image, text))

    def _encode(self, rows: list[int]) -> CLIPOutput:
        device = self.trainer.device
        return self.model(self.images[rows].to(device), self.tokens[rows].to(device))

    def gradient(self, pairs: PairFeatures, scale: Tensor, a: Tensor, rows: Any) -> list[Tensor]:
        """Parameter gradients of tau/B sum exp(-a) g for pairs `rows` with log-normalizers a [B, 2]."""
        g = torch.stack(batch_log_normalizers(pairs, scale, tile_size=1024), 1)
        image, text = margin_gradients(pairs, scale, a, a, g, weight=torch.ones_like(scale), tile_size=1024)
        parameters = [p for name, p in self.model.named_parameters() if name not in SCALARS]
        for parameter in parameters:
            parameter.grad = None
        first = 0
        for chunk in self._chunks(rows):
            part = slice(first, first + len(chunk))
            first = part.stop
            encoded = self._encode(chunk).both()
            ((encoded[0] * image[part]).sum() + (encoded[1] * text[part]).sum()).backward()
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]


def _exact_rows(data: _Pairs, scale: Tensor, eps: float) -> Tensor:
    places = torch.arange(len(data), device=data.image.device)
    rows = [
        torch.stack(
            exact_log_normalizers(
                data.image[part], data.text[part], places[part], data.image, data.text, 1 / scale, eps=eps
            ),
            1,
        )
        for part in (slice(first, first + 1024) for first in range(0, len(data), 1024))
    ]
    return torch.cat(rows).to(data.image)


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


class _Moments:
    """Running mean and spread of gradients, without keeping them."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.squares = 0.0
        self.shares: list[float] = []

    def add(self, gradient: Tensor, weights: Tensor) -> None:
        """One batch's gradient [p] and the weights of its anchors [B, 2]."""
        self.count += 1
        self.total = gradient.double() if self.total is None else self.total + gradient.double()
        self.squares += float(gradient.double().square().sum())
        self.shares.append(float((weights.sum(0).square() / (len(weights) * weights.square().sum(0))).mean()))

    def row(self, truth: Tensor) -> dict[str, float]:
        """Squared bias, bias (0 where its square is below), noise, cosine and share as the module says."""
        assert self.total is not None
        mean, truth = self.total / self.count, truth.double()
        norm = float(truth.norm())
        variance = max(0.0, self.squares / self.count - float(mean.square().sum())) * self.count / (self.count - 1)
        squared_bias = (float((mean - truth).square().sum()) - variance / self.count) / norm**2
        return {
            "gradient_bias_squared": squared_bias,
            "gradient_bias": math.sqrt(max(0.0, squared_bias)),
            "gradient_noise": math.sqrt(variance) / norm,
            "cosine": float(mean @ truth) / (float(mean.norm()) * norm),
            "anchor_share": sum(self.shares) / len(self.shares),
            "num_batches": float(self.count),
        }
