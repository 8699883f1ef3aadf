"""Scores measured during training in TensorBoard's event files, for runs without an evaluations.jsonl."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.untrusted_text import number, printable

_PREFIX = "eval/"


def read_event_scores(folder: Path) -> dict[str, dict[int, float]]:
    """Name without `eval/` -> step -> score, from all event files of `folder`; empty if there are none.

    What a kill cut off at the end of a file is not read. Raises OSError and ValueError for files that are no event
    files.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # 0.5 s to import

    # 0: every point, where the default would keep a sample of them.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    try:
        events.Reload()
    except DecodeError as error:
        raise ValueError(f"no event files: {error}") from error
    scores: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(_PREFIX):
            points = {event.step: number(event.value) for event in events.Scalars(tag)}
            known = {int(step): value for step, value in points.items() if value is not None}
            scores[printable(tag.removeprefix(_PREFIX))] = known
    return scores
