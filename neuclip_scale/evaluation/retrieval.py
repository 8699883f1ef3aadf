"""Retrieval of pictures by captions and captions by pictures, with one or several captions a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neuclip_scale.evaluation.datasets import (
    EvaluationSet,
    PictureBatch,
    Reading,
    Unreadable,
    nothing_usable,
    read_batches,
)
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.evaluation.prompts import encode_texts
from neuclip_scale.evaluation.ranking import chance_at, pessimistic_ranks, recall_at
from neuclip_scale.evaluation.sharing import gather_shares

RECALL_AT = (1, 5, 10)


class EncodedPairs(NamedTuple):
    """A retrieval set after the towers."""

    image_features: Tensor
    """[N, d], unit rows."""
    text_features: Tensor
    """[T, d], unit rows."""
    owner: Tensor
    """[T] int64: the picture each caption belongs to."""
    captions: list[str]
    unreadable: list[str]

    def first_captions(self) -> list[int]:
        """For each picture the position of its first caption."""
        firsts: dict[int, int] = {}
        for position, picture in enumerate(self.owner.tolist()):
            firsts.setdefault(picture, position)
        return list(firsts.values())


class EncodedBatch(NamedTuple):
    """One batch of a retrieval set after the towers, on the host."""

    position: int
    """Of its first picture in the whole set."""
    image_features: np.ndarray
    text_features: np.ndarray
    captions: list[list[str]]


def encode_pairs(encoders: Encoders, dataset: EvaluationSet, *, whole_shards: bool = False) -> EncodedPairs:
    """Encode every picture and caption of `dataset` (collective, unless the share is all); see `Reading`."""

    def encode() -> tuple[list[EncodedBatch], list[str]]:
        unreadable = Unreadable()
        reading = Reading(share=encoders.share, whole_shards=whole_shards)
        batches = read_batches(dataset, encoders.transform, encoders.batch_size, unreadable, reading)
        return [encode_batch(encoders, batch) for batch in batches], unreadable.reasons

    parts = gather_shares(encoders.share, encode)
    unreadable = [reason for _, reasons in parts for reason in reasons]
    batches = [batch for encoded, _ in parts for batch in encoded]
    if not batches:
        raise nothing_usable(dataset.folder, unreadable)
    return join_batches(batches, encoders.device, unreadable)


@torch.no_grad()
def encode_batch(encoders: Encoders, batch: PictureBatch) -> EncodedBatch:
    """Unit embeddings of the batch's pictures and of all their captions, `batch_size` of these at a time."""
    model, device = encoders.model, encoders.device
    features = F.normalize(model(images=batch.images.to(device)).image_features.float(), dim=-1)
    lines = [line for lines in batch.captions for line in lines]
    texts = encode_texts(model, encoders.tokenizer, lines, device, encoders.batch_size)
    return EncodedBatch(batch.positions[0], features.cpu().numpy(), texts.cpu().numpy(), batch.captions)


def join_batches(batches: Sequence[EncodedBatch], device: torch.device, unreadable: list[str]) -> EncodedPairs:
    """The batches of all ranks in the set's order, on `device`."""
    ordered = sorted(batches, key=lambda batch: batch.position)
    captions = [lines for batch in ordered for lines in batch.captions]
    owner = [picture for picture, lines in enumerate(captions) for _ in lines]
    return EncodedPairs(
        torch.from_numpy(np.concatenate([batch.image_features for batch in ordered])).to(device),
        torch.from_numpy(np.concatenate([batch.text_features for batch in ordered])).to(device),
        torch.tensor(owner, device=device),
        [line for lines in captions for line in lines],
        unreadable,
    )


def evaluate_retrieval(encoders: Encoders, dataset: EvaluationSet) -> dict[str, Any]:
    """Scores of `retrieval_scores`, and what could not be read (collective, unless the share is all).

    Raises `EvaluationDataError` for an unusable set.
    """
    pairs = encode_pairs(encoders, dataset)
    return {
        "task": "retrieval",
        **retrieval_scores(pairs.image_features, pairs.text_features, pairs.owner),
        "num_unreadable": len(pairs.unreadable),
        "unreadable": pairs.unreadable,
    }


def retrieval_scores(image_features: Tensor, text_features: Tensor, owner: Tensor) -> dict[str, dict[str, float] | int]:
    """Recall at 1, 5 and 10 in both directions, beside chance.

    Shapes: `image_features` [N, d], `text_features` [T, d], unit rows; `owner` [T], each text's picture. A
    picture's query succeeds if any of its captions is found. The same caption on two pictures is a tie, and
    lost.
    """
    num_images, num_texts = len(image_features), len(text_features)
    own = torch.bincount(owner, minlength=num_images)  # [N] captions of each picture
    order = owner.argsort(stable=True)
    first = own.cumsum(0) - own
    slot = torch.arange(num_texts, device=owner.device) - first[owner[order]]
    captions_of = owner.new_full((num_images, int(own.max())), -1)
    captions_of[owner[order], slot] = order
    to_text = pessimistic_ranks(image_features, text_features, captions_of)
    to_image = pessimistic_ranks(text_features, image_features, owner[:, None])
    one = torch.ones(num_texts, dtype=torch.int64)
    return {
        "image_to_text": {f"recall@{k}": recall_at(to_text, k) for k in RECALL_AT},
        "text_to_image": {f"recall@{k}": recall_at(to_image, k) for k in RECALL_AT},
        "chance_image_to_text": {f"recall@{k}": chance_at(own.cpu(), num_texts, k) for k in RECALL_AT},
        "chance_text_to_image": {f"recall@{k}": chance_at(one, num_images, k) for k in RECALL_AT},
        "num_pictures": num_images,
        "num_texts": num_texts,
    }
