"""Which clusters of pictures are wanted, and which cluster an embedding is in."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from neuclip_scale.subset.embeddings import MAX_WIDTH
from neuclip_scale.subset.errors import SubsetError
from neuclip_scale.subset.filters import ImageFilter

_ROWS_AT_ONCE = 4096


class ClusterFinder:
    """The centroids on their device."""

    def __init__(self, centroids: Path, device: str, is_alone: bool) -> None:
        """Load [k, d] centroids; raises `SubsetError`. Unless it `is_alone`, this process takes one core."""
        from neuclip_scale.similarity.nearest import NearestRows

        matrix = load_matrix(centroids, "--centroids")
        self.num_clusters, self.width = map(int, matrix.shape)
        try:
            self._nearest = NearestRows(matrix, device, _worker_number(), 0 if is_alone else 1)
        except ValueError as error:
            raise SubsetError(f"--device {device}: {error}.") from error

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[n] int64, cluster of each of [n, d] float32; -1 for one that is not finite."""
        found = np.full(len(features), -1, dtype=np.int64)
        usable = np.flatnonzero(np.isfinite(features).all(axis=1))
        for begin in range(0, len(usable), _ROWS_AT_ONCE):
            rows = usable[begin : begin + _ROWS_AT_ONCE]
            found[rows] = self._nearest(features[rows])
        return found


@lru_cache(maxsize=1)
def cluster_finder(centroids: Path, device: str, is_alone: bool) -> ClusterFinder:
    """The finder, made once a process."""
    return ClusterFinder(centroids, device, is_alone)


def wanted_clusters(each: ImageFilter) -> np.ndarray:
    """Numbers of the wanted clusters, sorted; raises `SubsetError`."""
    finder = cluster_finder(each.centroids, each.device, True)
    if each.clusters:
        numbers = _load_numbers(each.clusters)
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= finder.num_clusters:
            raise SubsetError(
                f"--clusters {each.clusters}: give numbers from 0 to {finder.num_clusters - 1}, rows of --centroids."
            )
        return np.unique(numbers)
    assert each.target_embeddings is not None
    found: set[int] = set()
    for block in _blocks(load_matrix(each.target_embeddings, "--target-embeddings", finder.width)):
        found.update(finder(block).tolist())
    if -1 in found:
        raise SubsetError(f"--target-embeddings {each.target_embeddings}: has rows that are not finite. Mend them.")
    return np.array(sorted(found), dtype=np.int64)


def load_matrix(path: Path, option: str, width: int = 0) -> Any:
    """A memory-mapped [n, d] array of floats; raises `SubsetError` for anything else, pickles among it."""
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SubsetError(f"{option} {path}: {error}. Save it with numpy.save, as an array of floats.") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f" or not matrix.size:
        what = f"{matrix.dtype}, shape {matrix.shape}" if isinstance(matrix, np.ndarray) else "several arrays"
        raise SubsetError(f"{option} {path}: holds {what}. Give one array of floats, a row each.")
    if matrix.shape[1] > MAX_WIDTH or (width and matrix.shape[1] != width):
        raise SubsetError(f"{option} {path}: rows of {matrix.shape[1]} numbers, and --centroids has {width}.")
    return matrix


def _load_numbers(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            numbers = np.load(path, allow_pickle=False)
            if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
                raise ValueError(f"holds {numbers.dtype}, shape {numbers.shape}")
            return np.asarray(numbers, dtype=np.int64)
        return np.array([int(line) for line in path.read_text("utf-8").split()], dtype=np.int64)
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise SubsetError(f"--clusters {path}: {error}. Give whole numbers, one a line, or a .npy of them.") from error


def _blocks(matrix: Any) -> Iterator[np.ndarray]:
    for begin in range(0, len(matrix), _ROWS_AT_ONCE):
        yield np.asarray(matrix[begin : begin + _ROWS_AT_ONCE], dtype=np.float32)


def _worker_number() -> int:
    """0, 1, ... of this process among its pool's."""
    identity = multiprocessing.current_process()._identity
    return identity[-1] - 1 if identity else 0
