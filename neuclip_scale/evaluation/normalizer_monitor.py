"""How wrong the log-normalizers of a training step are, measured while training goes on undisturbed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuclip_scale import distributed
from neuclip_scale.evaluation.reference_pairs import ReferencePairs
from neuclip_scale.normalizers.exact import error_statistics, exact_log_normalizers
from neuclip_scale.objectives import ObjectiveOutput
from neuclip_scale.similarity import PairFeatures

if TYPE_CHECKING:
    from neuclip_scale.engines import Engine


class NormalizerMonitor:
    """Holds a step's estimates against the exact values over the training set.

    The anchors are rank 0's pairs of the step as the objective saw them. The truth is log(eps + g) with g over all
    other reference pairs, augmented as in training and encoded with the same weights in evaluation mode.
    """

    def __init__(self, reference: ReferencePairs, *, every_steps: int, eps: float) -> None:
        self.reference, self.every_steps, self.eps = reference, every_steps, eps
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
        self._result = distributed.on_main(
            lambda: self._measure(engine, pairs, logit_scale, output, sample_index),
            with_all=engine.forward_is_collective,
        )
        self._result["normalizer/seconds"] = time.perf_counter() - began

    def take_result(self) -> dict[str, Any]:
        """The last measurement for the log, once; empty where there is none."""
        result, self._result = self._result, {}
        return result

    @torch.no_grad()
    def _measure(
        self, engine: Engine, pairs: PairFeatures, logit_scale: Tensor, output: ObjectiveOutput, sample_index: Tensor
    ) -> dict[str, Any]:
        features = self.reference.encode(engine)
        places = features.positions(sample_index)
        normalizers = output.normalizers
        assert normalizers is not None
        tau = 1 / logit_scale if normalizers.temperatures is None else normalizers.temperatures
        exact = torch.stack(
            exact_log_normalizers(pairs.image, pairs.text, places, features.image, features.text, tau, eps=self.eps),
            1,
        )  # [b, 2]
        self.on_exact(exact, output)
        result: dict[str, Any] = {"normalizer/num_reference": len(features.sample_index)}
        for suffix, rows in (("", normalizers.estimates), ("_batch", normalizers.batch_rows)):
            for name, value in error_statistics(rows, exact).items():
                result[f"normalizer/{name}{suffix}"] = value
        return result
