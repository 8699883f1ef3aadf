"""What `neuclip study normalizer` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NormalizerStudy:
    """Train one model per batch, data size and seed; many estimators of the log-normalizer watch it and are held
    against the exact values over all pairs."""

    output: Path
    """Folder for rows.json, tables, figures and index.html. Finished trajectories in it are not run again."""
    recipe: str = "demo"
    """Recipe of the model and its training."""
    data: str = ""
    """Training shards; empty takes the recipe's."""
    driver: str = "openclip"
    """Objective that trains the model; no estimator touches the training. Not siglip, which has no normalizer, nor
    isogclr and fastclip-v2, whose temperatures are each pair's own."""
    batches: tuple[int, ...] = (128,)
    """Global batch sizes B."""
    shards: tuple[int, ...] = (0,)
    """Numbers of shards to train on, which vary n; 0 takes all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trajectories."""
    steps: int = 400
    """Steps of a trajectory."""
    measure_every: int = 50
    """Steps between measurements; means leave out those of the first fifth."""
    prototypes: int = 1024
    """m of the NPN, unless a sweep changes it."""
    restart_every: int = 100
    """T_r of the NPN, unless a sweep changes it."""
    sweeps: tuple[str, ...] = ()
    """Further estimators: updates, restarts, rate, grid (of both), prototypes, source, own, accumulator,
    queue, mix."""
    estimators: tuple[str, ...] = ()
    """Only these of all, by their labels in the report, as queue "NPN, lr 0.003"; the mini-batch's is always there."""
    gradient_batches: int = 0
    """Batches for bias and variance of the encoders' gradient at the end of each trajectory; 0 leaves it out."""
    threads: int = 0
    """Threads of torch; 0 takes its default. Those of another number make other times, and another study."""
    json: Path | None = None
    """Also write the result to this file."""
