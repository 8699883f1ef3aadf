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
            size = f"{scores['num_pictures']:,} pictures, {scores['num_classes']:,} classes"
            yield Measure(name, f"top-1 ({size})", scores["top1"], scores["chance_top1"], scores["majority"])
            yield Measure(name, "top-5", scores["top5"], scores["chance_top5"], None)
            recall = scores["mean_per_class_recall"]
            yield Measure(name, "mean per-class recall", recall, scores["chance_top1"], None)
            continue
        sizes = {
            "image_to_text": f"{scores['num_texts']:,} texts",
            "text_to_image": f"{scores['num_pictures']:,} pictures",
        }
        for direction, size in sizes.items():
            for measure, value in scores[direction].items():
                label = f"{direction.replace('_', ' ')} {measure.replace('recall', 'R')} ({size})"
                yield Measure(name, label, value, scores[f"chance_{direction}"][measure], None)
