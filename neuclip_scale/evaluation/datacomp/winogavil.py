"""WinoGAViL: of 5 to 12 pictures, those that a cue was given for (arXiv 2207.12576)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from neuclip_scale.evaluation.datacomp.archive import Archive, parse_list, read_pictures, read_table
from neuclip_scale.evaluation.datacomp.metrics import jaccard_metrics, jaccard_score
from neuclip_scale.evaluation.datacomp.outcome import Outcome
from neuclip_scale.evaluation.datacomp.tasks import Task
from neuclip_scale.evaluation.datasets import EvaluationDataError, Unreadable, nothing_usable
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.evaluation.prompts import encode_texts
from neuclip_scale.evaluation.sharing import agree, gather_shares


class Instance(NamedTuple):
    """One cue and its candidates, by name; `right` [c] tells those it was given for."""

    cue: str
    candidates: list[str]
    right: np.ndarray


def evaluate_winogavil(task: Task, folder: Path, encoders: Encoders) -> Outcome:
    """Jaccard scores (collective, unless the share is all); raises `EvaluationDataError` on every rank."""
    archive = agree(encoders.share, lambda: Archive(folder))
    instances, unreadable = agree(encoders.share, lambda: read_instances(folder))
    names = sorted({name for instance in instances for name in instance.candidates})
    pictures, cues, broken = _encode(archive, names, [prompt(instance.cue) for instance in instances], encoders)
    numbers = {name: position for position, name in enumerate(names)}
    scores, sizes = [], []
    for number, instance in enumerate(instances):
        chosen = [numbers[name] for name in instance.candidates]
        if not all(position in pictures for position in chosen):
            unreadable.append(f"{instance.cue}: a candidate's picture is missing or unreadable")
            continue
        similarities = np.stack([pictures[position] for position in chosen]) @ cues[number]
        scores.append(jaccard_score(similarities, instance.right))
        sizes.append(len(chosen))
    unreadable += broken
    if not scores:
        raise nothing_usable(folder, unreadable)
    return Outcome(jaccard_metrics(scores, sizes), len(scores), unreadable)


def read_instances(folder: Path) -> tuple[list[Instance], list[str]]:
    """The instances of a folder's table, and what is wrong with its other rows. Raises `EvaluationDataError`."""
    instances, faults = [], []
    for number, row in enumerate(read_table(folder, ("cue", "candidates", "associations")), start=1):
        try:
            instances.append(_instance(row))
        except ValueError as error:
            faults.append(f"row {number}: {error}")
    if not instances:
        raise EvaluationDataError(f"{folder}: no row of its table is usable, first: {faults[:1]}.")
    return instances, faults


def prompt(cue: str) -> str:
    """The text that a cue becomes, as DataComp words it."""
    cue = cue.lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def _instance(row: dict[str, str]) -> Instance:
    candidates, wanted = parse_list(row["candidates"]), set(parse_list(row["associations"]))
    right = np.array([name in wanted for name in candidates], dtype=bool)
    if not row["cue"] or not right.any():
        raise ValueError("no cue, or none of the candidates is among the associations")
    return Instance(row["cue"], candidates, right)


def _encode(
    archive: Archive, names: list[str], prompts: list[str], encoders: Encoders
) -> tuple[dict[int, np.ndarray], np.ndarray, list[str]]:
    """Unit rows of the pictures that could be read, by position in `names`; of the cues, [N, d]; and the rest."""
    share, size = encoders.share, encoders.batch_size

    @torch.no_grad()
    def encode() -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], list[str]]:
        unreadable = Unreadable()
        pictures: dict[int, np.ndarray] = {}
        for positions, images in read_pictures(archive, names, encoders.transform, size, share, unreadable):
            features = encoders.model(images=images.to(encoders.device)).image_features.float()
            pictures.update(zip(positions, F.normalize(features, dim=-1).cpu().numpy(), strict=True))
        cues = {}
        for number, start in enumerate(range(0, len(prompts), size)):
            if share.owns(number):
                part = prompts[start : start + size]
                rows = encode_texts(encoders.model, encoders.tokenizer, part, encoders.device, size)
                cues[number] = rows.cpu().numpy()
        return pictures, cues, unreadable.reasons

    pictures: dict[int, np.ndarray] = {}
    cues: dict[int, np.ndarray] = {}
    broken: list[str] = []
    for some_pictures, some_cues, some_broken in gather_shares(share, encode):
        pictures |= some_pictures
        cues |= some_cues
        broken += some_broken
    return pictures, np.concatenate([cues[number] for number in sorted(cues)]), broken
