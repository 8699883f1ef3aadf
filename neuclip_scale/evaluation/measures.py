"""The scores of an evaluation by name, beside what guessing gives. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Scores = Mapping[str, Any]


class Measure(NamedTuple):
    """One score of a set beside what guessing gives; fractions."""

    set_name: str
    label: str
    value: float
    chance: float
    majority: float | None


def measures(evaluation: Mapping[str, Scores]) -> Iterator[Measure]:
    """The scores of what `evaluate_folder` returned, in a fixed order."""
    for name, scores in evaluation.items():
        if scores["task"] == "zeroshot":
            yield Measure(name, "top-1", scores["top1"], scores["chance_top1"], scores["majority"])
            yield Measure(name, "top-5", scores["top5"], scores["chance_top5"], None)
            recall = scores["mean_per_class_recall"]
            yield Measure(name, "class recall", recall, scores["chance_top1"], None)
            continue
        for direction, label in (("image_to_text", "image→text"), ("text_to_image", "text→image")):
            for measure, value in scores[direction].items():
                chance = scores[f"chance_{direction}"][measure]
                yield Measure(name, f"{label} {measure.replace('recall', 'R')}", value, chance, None)


def set_sizes(evaluation: Mapping[str, Scores]) -> str:
    """How large each set is, for people."""
    sizes = []
    for name, scores in evaluation.items():
        other = ("classes", "num_classes") if scores["task"] == "zeroshot" else ("texts", "num_texts")
        sizes.append(f"{name}: {scores['num_pictures']:,} pictures, {scores[other[1]]:,} {other[0]}")
    return "; ".join(sizes)
