"""One task on one folder: read, encode, score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from neuclip_scale.evaluation.datacomp.archive import Archive, parse_list, read_pictures, read_table
from neuclip_scale.evaluation.datacomp.metrics import classification_metrics, retrieval_metrics
from neuclip_scale.evaluation.datacomp.outcome import Outcome
from neuclip_scale.evaluation.datacomp.tasks import Kind, Task
from neuclip_scale.evaluation.datacomp.winogavil import evaluate_winogavil
from neuclip_scale.evaluation.datasets import (
    EvaluationDataError,
    EvaluationSet,
    PictureBatch,
    Unreadable,
    nothing_usable,
    open_set,
)
from neuclip_scale.evaluation.datasets import Task as SetTask
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.evaluation.retrieval import (
    EncodedBatch,
    EncodedPairs,
    encode_batch,
    encode_pairs,
    join_batches,
    retrieval_scores,
)
from neuclip_scale.evaluation.sharing import agree, gather_shares
from neuclip_scale.evaluation.zero_shot import predict


def evaluate_task(task: Task, folder: Path, encoders: Encoders) -> Outcome:
    """The metrics of `task` (collective, unless the share is all).

    Raises `EvaluationDataError`, on every rank, for a folder that cannot be used: a shard that is cut off is an
    error here, since part of a set is not the task.
    """
    return _EVALUATE[task.kind](task, folder, encoders)


def _evaluate_classification(task: Task, folder: Path, encoders: Encoders) -> Outcome:
    dataset = _open(folder, "zeroshot", encoders)
    found = predict(encoders, dataset, whole_shards=True, group_columns=task.group_columns)
    metrics = classification_metrics(
        task, found.ranks, found.labels, found.predicted, found.groups, len(dataset.class_names)
    )
    return Outcome(metrics, len(found.labels), found.unreadable)


def _evaluate_retrieval(task: Task, folder: Path, encoders: Encoders) -> Outcome:
    if (folder / "test").is_dir():
        dataset = _open(folder, "retrieval", encoders)
        pairs = encode_pairs(encoders, dataset, whole_shards=True)
    else:
        pairs = _encode_table(folder, encoders)
    scores = retrieval_scores(pairs.image_features, pairs.text_features, pairs.owner)
    found = {name: scores[name] for name in ("image_to_text", "text_to_image")}
    return Outcome(retrieval_metrics(found), len(pairs.image_features), pairs.unreadable)  # type: ignore[arg-type]


def _encode_table(folder: Path, encoders: Encoders) -> EncodedPairs:
    """A retrieval set whose captions stand in a table, column `raw`, by the `filename` of their picture."""
    archive = agree(encoders.share, lambda: Archive(folder))
    rows = agree(encoders.share, lambda: read_table(folder, ("filename", "raw")))
    names, captions, faults = [], [], []
    for number, row in enumerate(rows, start=1):
        try:
            lines = [line.strip() for line in parse_list(row["raw"]) if line.strip()]
        except ValueError as error:
            faults.append(f"row {number}: {error}")
            continue
        if lines:
            names.append(row["filename"])
            captions.append(lines)
        else:
            faults.append(f"row {number}: no caption")

    def encode() -> tuple[list[EncodedBatch], list[str]]:
        unreadable = Unreadable()
        encoded = []
        for positions, images in read_pictures(
            archive, names, encoders.transform, encoders.batch_size, encoders.share, unreadable
        ):
            batch = PictureBatch(images, [], [captions[position] for position in positions], positions, [])
            encoded.append(encode_batch(encoders, batch))
        return encoded, unreadable.reasons

    parts = gather_shares(encoders.share, encode)
    unreadable = faults + [reason for _, reasons in parts for reason in reasons]
    batches = [batch for encoded, _ in parts for batch in encoded]
    if not batches:
        raise nothing_usable(folder, unreadable)
    return join_batches(batches, encoders.device, unreadable)


def _open(folder: Path, kind: SetTask, encoders: Encoders) -> EvaluationSet:
    dataset = agree(encoders.share, lambda: open_set(folder))
    if dataset.task != kind:
        raise EvaluationDataError(
            f"{folder} is a set for {dataset.task}, and this task is {kind}: dataset_type.txt says `retrieval` in a "
            "retrieval set and is absent elsewhere."
        )
    return dataset


_EVALUATE: dict[Kind, Callable[[Task, Path, Encoders], Outcome]] = {
    "classification": _evaluate_classification,
    "retrieval": _evaluate_retrieval,
    "winogavil": evaluate_winogavil,
}
