"""Evaluation of a run while it trains: when, on what, and by which ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError
from neuclip_scale.config.schema import EvaluationConfig
from neuclip_scale.evaluation.datasets import EvaluationDataError, ImageTransform, open_set
from neuclip_scale.evaluation.sharing import ALL, my_share
from neuclip_scale.evaluation.suite import evaluate_folder, find_sets
from neuclip_scale.models.batch_norm import share_running_statistics
from neuclip_scale.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from neuclip_scale.engines import Engine


class TrainingEvaluation:
    """The evaluations of one run. Raises `ConfigError` now, and not after days, for sets that cannot be opened
    (collective).
    """

    def __init__(self, section: EvaluationConfig, global_batch_size: int) -> None:
        self.section, self.global_batch_size = section, global_batch_size
        distributed.on_main(self._open_all)

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step` (1-based): every so many steps, or as a chosen number of samples is seen."""
        seen = step * self.global_batch_size
        chosen = any(seen - self.global_batch_size < at <= seen for at in self.section.at_samples)
        return chosen or (self.section.every_steps > 0 and step % self.section.every_steps == 0)

    def run(
        self, engine: Engine, tokenizer: Tokenizer, transform: ImageTransform, device: torch.device
    ) -> dict[str, Any]:
        """Scores of every set, equal on all ranks; empty without evaluation data (collective).

        The ranks divide the pictures. Where a forward pass needs all ranks (sharded encoders), each does everything.
        """
        if not self.section.data:
            return {}
        folder = Path(self.section.data)
        with engine.averaged(), engine.module.compiling_nothing_new():
            if not engine.forward_is_collective:
                share_running_statistics(engine.module)
                return evaluate_folder(engine.module, folder, tokenizer, transform, device, share=my_share())
            return distributed.on_main(
                lambda: evaluate_folder(engine.module, folder, tokenizer, transform, device, share=ALL), with_all=True
            )

    def _open_all(self) -> None:
        folder = self.section.data
        if not folder:
            return
        try:
            for path in find_sets(Path(folder)).values():
                open_set(path)
        except EvaluationDataError as error:
            raise ConfigError(
                "evaluation.data",
                folder,
                str(error).removesuffix("."),
                "An empty string trains without evaluation.",
            ) from error
