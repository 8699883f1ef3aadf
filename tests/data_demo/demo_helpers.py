"""Pieces that several tests of the demo data share."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.data.demo.build import DemoOptions
from neuclip_scale.data.demo.icons import Icon

LIMIT = 400
HELD_OUT_NAMES = 20


def demo_options(out: Path, cache: Path) -> DemoOptions:
    return DemoOptions(
        out=out, cache=cache, num_concepts=LIMIT, num_held_out_names=HELD_OUT_NAMES, offline=True, workers=1
    )


def make_icon(body: str, source: str = "noto", name: str = "box", code: str = "", **entry: object) -> Icon:
    return Icon(source, name, {"body": body, "width": 10, "height": 10, **entry}, code)
