"""The training step and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuclip_scale import distributed, files, telemetry
from neuclip_scale.config import (
    ConfigError,
    Recipe,
    check_places,
    check_recipe,
    dump_recipe,
    local_batch_size,
    micro_batch_size,
    num_micro_batches,
    num_steps,
    warnings_at_start,
)
from neuclip_scale.cost import PackedTokens, StepArithmetic
from neuclip_scale.data.batch import Batch
from neuclip_scale.data.loader import LoadedBatch, TrainLoader
from neuclip_scale.data.required_audit import required_audit
from neuclip_scale.data.run_manifest import run_manifest
from neuclip_scale.data.skips import SkipLog, check_bad_fraction
from neuclip_scale.data.transforms import EvalTransform, TrainTransform
from neuclip_scale.engines import create_engine
from neuclip_scale.engines.base import set_matmul_precision
from neuclip_scale.engines.compiling import compiles_everywhere
from neuclip_scale.evaluation.in_training import TrainingEvaluation
from neuclip_scale.evaluation.normalizer_monitor import NormalizerMonitor
from neuclip_scale.evaluation.reference_pairs import ReferencePairs
from neuclip_scale.grad_cache import CachedFeatures, KeptActivations, RandomState
from neuclip_scale.launched_step import LaunchedStep, QueuedNumbers, StepClock, StepResult
from neuclip_scale.models.building import plan_model
from neuclip_scale.models.pretrained import pretrained_values
from neuclip_scale.models.tokenizer import build_tokenizer
from neuclip_scale.non_finite import NonFiniteLossError, check_finite
from neuclip_scale.normalizers import DatasetFeatures
from neuclip_scale.objectives import ObjectiveOutput, create_objective
from neuclip_scale.objectives.registry import Problem
from neuclip_scale.objectives.temperature import out_of_reach
from neuclip_scale.optim import schedule_factor, set_learning_rates
from neuclip_scale.run_owner import check_run_dir, check_trained_by_no_other
from neuclip_scale.run_state import RunState, StopSignal
from neuclip_scale.run_summary import run_summary
from neuclip_scale.sections import StepTimer, left_out, section
from neuclip_scale.telemetry.hang_watch import HangWatch


class Trainer:
    """One training run, from a recipe to a finished run folder.

        Trainer(load_recipe("demo", {"run_dir": "runs/demo", "data.train": "shards/"})).fit()

    Building one is a collective: every rank must do it, and call `fit`. Raises `ConfigError` for a recipe that
    cannot be run.
    """

    def __init__(self, config: Recipe) -> None:
        self.config = config
        # The hang watch, which names the rank that hangs, comes before the process group's own end.
        patience = max(30.0, config.train.hang_timeout_seconds / 60 + 5)
        self.device = distributed.initialize(config.engine.device, patience, config.engine.fsdp.cpu_offload)
        set_matmul_precision(config.train, self.device)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        check_recipe(config, self.world_size)
        check_places(config)
        distributed.on_main(lambda: check_run_dir(Path(config.run_dir)))
        if config.train.precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("train.precision", "fp16", "there is no GPU here", "Use bf16 or fp32 on a CPU.")
        self.run_dir = Path(config.run_dir)
        self.run_state = RunState(self.run_dir / "checkpoints", config)
        start_from = self.run_state.find_start()

        self.evaluation = TrainingEvaluation(config.evaluation, config.train.global_batch_size)
        # Equal weights on every rank; what the ranks draw afterwards (dropout) differs. Before the data are indexed,
        # which can take hours: a model that cannot be built is an error of the first minute.
        distributed.seed_everything(config.seed)
        self.compiled = compiles_everywhere(config, self.device)
        model = plan_model(config, compiled=self.compiled)
        self.arithmetic = distributed.on_main(lambda: StepArithmetic.of(model, config, self.world_size, self.device))
        self.manifest = run_manifest(self.run_dir / "manifest.json", config.data)
        audit = config.data.require_audit
        self.audit = distributed.on_main(lambda: required_audit(audit, self.manifest.fingerprint) if audit else None)
        self.num_steps = num_steps(config, self.manifest.num_samples)
        if start_from is None:
            model.starting_values = pretrained_values(config.model, model)
        self.engine = create_engine(model, config, self.device)
        self.objective = create_objective(
            config.objective,
            Problem(
                embed_dim=model.embed_dim,
                dataset_size=self.manifest.num_samples,
                num_epochs=self.num_steps * config.train.global_batch_size / self.manifest.num_samples,
                seed=config.seed,
                global_batch_size=config.train.global_batch_size,
                projected_widths=model.projected_widths,
                encode_dataset=self._encode_dataset,
                encode_flops=self.arithmetic.encoders.forward * self.manifest.num_samples,
            ),
        ).to(self.device)
        model.show_projections(self.objective.needs_projections)
        distributed.seed_everything(config.seed, offset=1 + self.rank)
        self.tokenizer = build_tokenizer(config.model)
        look = model.image_size, model.image_mean, model.image_std
        self.train_transform = TrainTransform(*look, config.data.crop_scale)
        self.loader = TrainLoader(
            self.manifest,
            config.data,
            global_batch_size=config.train.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            seed=config.seed,
            transform=self.train_transform,
            tokenizer=self.tokenizer,
            pin_memory=self.device.type == "cuda",
        )
        self.eval_transform = EvalTransform(*look)
        self.micro_batch_size = micro_batch_size(config, self.world_size)
        self.kept_activations = KeptActivations.of(config.train, num_micro_batches(config, self.world_size))
        self.monitor = self._normalizer_monitor()
        self._all_pairs: ReferencePairs | None = None
        if start_from is not None:
            self.run_state.load(start_from, self.engine, self.objective, self.loader, self.manifest)
        facts, patience = self.arithmetic.facts(self.num_steps), config.train.hang_timeout_seconds
        self.watch = HangWatch(self.run_dir, self.rank, self.world_size, patience, facts)

    def fit(self) -> dict[str, Any]:
        """Train to the end, or to a stop signal (collective); returns what summary.json holds.

        SIGTERM and SIGUSR1 save, up to four steps later, and return with status "stopped"; the same call goes on.
        Raises NonFiniteLossError, TooManyBadSamples, CheckpointError.
        """
        config, state = self.config, self.run_state
        distributed.on_main(lambda: check_trained_by_no_other(self.run_dir))  # it may have begun since
        skips = SkipLog(self.run_dir / "skipped" / f"rank_{self.rank:05d}.jsonl")
        if distributed.is_main():
            skips.add_shard_faults(self.manifest)
        logger = telemetry.RunLogger(
            self.run_dir,
            self.rank,
            self.num_steps,
            config.train.global_batch_size,
            config.train.log_every_steps,
            state.step,
            world_size=self.world_size,
            facts={"compiled_towers": self.compiled},
            recipe=dump_recipe(config),
            changed=state.changed,
        )
        with logger, state.cost.metered(self.device), self.watch.running(state.step), StopSignal() as stop:
            if faulty := self.manifest.faulty_shards:
                first = f"first {faulty[0].path}: {faulty[0].fault}"
                logger.message(f"{len(faulty)} damaged shard(s), listed in {skips.path.parent}; {first}")
            beyond = out_of_reach(config.objective, self.manifest.num_samples, config.train.global_batch_size)
            for warning in filter(None, (beyond, *warnings_at_start(config, self.num_steps), state.change_told)):
                logger.message(f"warning: {warning}")
            self._catch_up(logger)
            self._run_steps(skips, logger, stop)
            finished = state.step >= self.num_steps
            if not finished:
                # Started again from a PATH, the run would begin there once more.
                again = "Run again" if config.resume == "auto" else "Run again with --resume auto"
                logger.message(
                    f"stopped by {stop.name or 'another rank'} at step {state.step}; saved. {again} to go on."
                )
            return self._finish(logger, finished)

    def _run_steps(self, skips: SkipLog, logger: telemetry.RunLogger, stop: StopSignal) -> None:
        """Train until the end, or until a rank is asked to stop; save and evaluate where due (collective).

        The next step is launched before a step's numbers are read, so that a GPU always has work.
        """
        batches, clock = iter(self.loader), StepClock()
        before: LaunchedStep | None = None
        stopping = False
        while self.run_state.step < self.num_steps and not stopping:
            try:
                launched = self._launch(batches, skips, stop)
            except Exception:  # of the data, say: the step before gets its line. Other ranks are in other collectives.
                if before is not None and self.world_size == 1:
                    self._record(before, skips, logger, clock)
                raise
            if before is not None:
                stopping = self._record(before, skips, logger, clock)
            before = launched
            if stopping or self._reads_at_once(launched.number):
                stopping |= self._record(launched, skips, logger, clock)
                before = None
                with clock.paused():
                    self._between_steps(logger, stopping)

    def _reads_at_once(self, step: int) -> bool:
        """Whether step `step` must be recorded before another is launched; equal on all ranks."""
        # The time that the normalizers' measurement takes is left out of its own step, so none may run beside it.
        measures = self.monitor.is_due(step + 1)
        return step == self.num_steps or self._save_is_due(step) or self.evaluation.is_due(step) or measures

    def _launch(self, batches: Iterator[LoadedBatch], skips: SkipLog, stop: StopSignal) -> LaunchedStep:
        """Load a batch, and queue a step on it and its numbers' way to the host (collective)."""
        state, optim, number = self.run_state, self.config.optim, self.run_state.launched + 1
        began = time.perf_counter()
        with StepTimer(self.device) as timer:
            with section("data"), RandomState.kept(self.device):
                loaded = next(batches)
            data_time = time.perf_counter() - began
            factor = schedule_factor(number - 1, self.num_steps, optim)
            set_learning_rates(
                self.engine.optimizer,
                factor,
                constant_temperature=optim.temperature_schedule == "constant",
                temperature_dropped=state.temperature_dropped(number),
            )
            with section("data"):
                batch = loaded.batch.to(self.device, non_blocking=True)
            result = self.train_step(batch, self.monitor if self.monitor.is_due(number) else None)
            numbers = QueuedNumbers(result, loaded, stop=stop.requested, save_is_written=state.save_is_written)
        skips.add(loaded.skipped)
        state.launched = number
        self.watch.launched(number)
        return LaunchedStep(
            number,
            numbers,
            loaded,
            features=(result.pairs.image, result.pairs.text),
            timer=timer,
            data_time=data_time,
            learning_rate=optim.learning_rate * factor,
            objective_flops=self.arithmetic.objective_flops(self.objective),
            measured=self.monitor.take_result(),
        )

    def _record(self, step: LaunchedStep, skips: SkipLog, logger: telemetry.RunLogger, clock: StepClock) -> bool:
        """Wait for the numbers of the oldest step not yet recorded, check and log them (collective); returns whether
        to stop.
        """
        config, state = self.config, self.run_state
        numbers = step.numbers.read()
        metrics = numbers.metrics
        try:
            uids = step.loaded.batch.uids
            check_finite(metrics, step.features, uids, step.number, self.run_dir, config.train.precision)
        except NonFiniteLossError:  # of numbers that are equal on all ranks
            state.finish_save()
            raise
        state.advance(step.loaded, numbers)
        for line in state.close_epochs(self.loader.order, numbers.positions):
            logger.message(line)
        # Counts of all ranks, equal on all ranks: they stop together.
        check_bad_fraction(
            state.num_read,
            state.num_skipped,
            skips.first,
            config.data.max_bad_fraction,
            f"listed in {skips.path.parent}",
        )
        # Measuring is not training: its time would count against the method that is measured.
        step_time = clock.step(numbers.arrival) - step.measured.get("normalizer/seconds", 0.0)
        sections = step.timer.seconds()
        state.cost.add_step(step_time, sections, self.arithmetic, step.objective_flops, numbers.captions)
        metrics |= step.measured | self.arithmetic.metrics(numbers.captions, step_time)
        metrics |= {"lr": step.learning_rate, "data_time": step.data_time}
        metrics |= {"step_time": step_time, "num_skipped": state.num_skipped}
        metrics |= {f"time/{name}": spent for name, spent in sections.items()}
        logger.log_step(step.number, metrics)
        if numbers.saved:
            state.finish_save()
        self.watch.finished(step.number)
        return numbers.stopping

    def train_step(self, batch: Batch, monitor: NormalizerMonitor | None = None) -> StepResult:
        """One optimizer step on this rank's part of the global batch (collective)."""
        engine = self.engine
        engine.module.begin_step()
        with section("encode"):
            micro_batches = [part.packed(engine.module) for part in batch.split(self.micro_batch_size)]
            cached = CachedFeatures(
                engine.encode,
                engine.module,
                micro_batches,
                engine.micro_step,
                self.kept_activations,
                gather=self.config.objective.exchange == "gather",
            )
        world_index = distributed.all_gather_rows(batch.sample_index)
        pairs = cached.pairs
        self.objective.train()
        with section("objective"):
            output = self.objective(pairs, cached.logit_scale, world_index, cached.logit_bias)
        if monitor is not None:
            with self.watch.paused(), left_out(), self.run_state.cost.paused(), RandomState.kept(self.device):
                monitor.measure(engine, pairs, cached.logit_scale, output, batch.sample_index)
        with section("replay"):
            self._replay(cached, output)
        with section("optimizer"):
            grad_norm = engine.step(self.config.train.max_grad_norm)
            engine.clamp_temperature(self.config.objective.temperature_min, self.config.objective.temperature_max)
            engine.update_average(self.run_state.launched + 1)
        captions = PackedTokens.of(micro_batches, engine.module)
        return StepResult(pairs, output, cached.logit_scale, grad_norm, captions)

    def _replay(self, cached: CachedFeatures, output: ObjectiveOutput) -> None:
        """Back-propagate the feature gradients, one micro-batch after the other (collective in the last)."""
        for rows, encoded in cached.replay():
            is_last = rows.stop == cached.image.shape[0]
            with section("backward"):
                self.engine.backward(
                    encoded,
                    output.image_gradient[rows],
                    output.text_gradient[rows],
                    output.logit_scale_gradient if is_last else None,
                    output.logit_bias_gradient if is_last else None,
                )

    def _normalizer_monitor(self) -> NormalizerMonitor:
        section = self.config.evaluation
        return NormalizerMonitor(
            self._reference_pairs(section.normalizer_reference),
            every_steps=section.normalizer_every_steps,
            eps=self.config.objective.eps,
        )

    def _reference_pairs(self, num_reference: int = 0, *, always_keep: bool = False) -> ReferencePairs:
        return ReferencePairs(
            self.manifest,
            self.config.data,
            num_reference=num_reference,
            transform=self.train_transform,
            tokenizer=self.tokenizer,
            batch_size=self.micro_batch_size,
            seed=self.config.seed,
            always_keep=always_keep,
        )

    def _encode_dataset(self) -> DatasetFeatures:
        """All pairs as the encoders stand, for an objective that asks for them; every rank encodes all."""
        if self._all_pairs is None:
            self._all_pairs = self._reference_pairs(always_keep=True)
        with self.watch.paused(), RandomState.kept(self.device):
            return self._all_pairs.encode(self.engine)

    def _between_steps(self, logger: telemetry.RunLogger, stopping: bool) -> None:
        step = self.run_state.step
        last = step >= self.num_steps
        if self._save_is_due(step) or stopping or last:
            with self.run_state.cost.paused():
                self.run_state.start_save(self.engine, self.objective, self.manifest)
                if stopping or last or not self.config.checkpoint.background:
                    self.run_state.finish_save()
        if not last and not stopping and self.evaluation.is_due(step):
            self._evaluate_between(logger)

    def _save_is_due(self, step: int) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return every_steps > 0 and step % every_steps == 0

    def _catch_up(self, logger: telemetry.RunLogger) -> None:
        """Evaluate what was due at the step that the run goes on from, if it had been stopped before."""
        step = self.run_state.step
        due = 0 < step < self.num_steps and self.evaluation.is_due(step)
        if due and not distributed.on_main(lambda: logger.has_evaluation(step)):
            self._evaluate_between(logger)

    def _evaluate_between(self, logger: telemetry.RunLogger) -> None:
        with self.run_state.cost.paused():
            logger.log_evaluation(self.run_state.step, self._evaluate())

    def _evaluate(self) -> dict[str, Any]:
        """Scores of every evaluation set (collective)."""
        with self.watch.paused(), RandomState.kept(self.device):
            return self.evaluation.run(self.engine, self.tokenizer, self.eval_transform, self.device)

    def _finish(self, logger: telemetry.RunLogger, finished: bool) -> dict[str, Any]:
        state = self.run_state
        with state.cost.paused():
            evaluation = self._evaluate() if finished else {}
        cost = state.cost.summary(self.arithmetic, state.step) | logger.lost.summary()
        logger.log_evaluation(state.step, evaluation)
        summary = {
            "status": "finished" if finished else "stopped",
            **run_summary(self.config, state, self.manifest, self.loader.order, cost),
            "num_steps": self.num_steps,
            "world_size": self.world_size,
            "local_batch_size": local_batch_size(self.config, self.world_size),
            "device": str(self.device.type),
            "evaluated_weights": "last" if self.engine.average is None else "ema",
            "audit": asdict(self.audit) if self.audit else None,
            "evaluation": evaluation,
        }
        if distributed.is_main():
            files.write_json(self.run_dir / "summary.json", summary)
        return summary


__all__ = ["NonFiniteLossError", "StepResult", "Trainer"]
