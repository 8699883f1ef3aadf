"""Pages of example retrievals for a model and an evaluation folder."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.evaluation.datasets import open_set, read_thumbnails
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.evaluation.figures import retrieval_page
from neuclip_scale.evaluation.retrieval import encode_pairs
from neuclip_scale.evaluation.suite import find_sets


def draw_retrieval_pages(encoders: Encoders, data: Path, output: Path) -> list[Path]:
    """Draw OUTPUT/NAME.png for each retrieval set under `data`; returns the files."""
    paths = []
    for name, path in find_sets(data).items():
        dataset = open_set(path)
        if dataset.task != "retrieval":
            continue
        pairs = encode_pairs(encoders, dataset)
        first = pairs.first_captions()
        paths.append(output / f"{name}.png")
        retrieval_page(
            pairs.image_features,
            pairs.text_features[first],
            read_thumbnails(dataset),
            [pairs.captions[position] for position in first],
            paths[-1],
            title=f"{name}: {len(first):,} pictures, queries drawn at random",
        )
    return paths
