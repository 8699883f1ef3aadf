"""SVG icons to small JPEG pictures on white, in a few processes, with the fingerprints that duplicates are
found by.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from types import ModuleType

import numpy as np

from neuclip_scale.data.demo.icons import Icon, IconError, svg_document

JPEG_QUALITY = 92
THUMB_SIDE = 16
_CHUNK = 128
_SERIAL_BELOW = 1500
"""Fewer icons than this are drawn sooner in this process than others can start."""


class MissingRendererError(RuntimeError):
    """resvg is not installed."""


@dataclass(frozen=True)
class Picture:
    """One drawn icon; `pixels_sha256` is of its RGB pixels before JPEG, `thumb` a [16, 16, 3] uint8
    reduction.
    """

    jpeg: bytes
    pixels_sha256: str
    thumb: np.ndarray
    blank: bool


def rasterise(icons: Sequence[Icon], size: int, workers: int) -> Iterator[Picture | str]:
    """Draw `icons` at `size` x `size` pixels, in order; a text in a picture's place says why it could not be
    drawn.

    Deterministic for one version of resvg and Pillow: no system font, no file and no network is used.
    """
    import_renderer()
    chunks = [icons[start : start + _CHUNK] for start in range(0, len(icons), _CHUNK)]
    if workers <= 1 or len(icons) < _SERIAL_BELOW:
        for chunk in chunks:
            yield from _draw_chunk(chunk, size)
        return
    # spawn: the parent has threads (progress bar, torch), and a fork would copy their locks.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for pictures in pool.map(_draw_chunk, chunks, [size] * len(chunks)):
                yield from pictures
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def default_workers() -> int:
    """Processes for `rasterise`: the cores this process may use, at most four (more are not kept busy)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def import_renderer() -> ModuleType:
    """The module resvg_py; raises `MissingRendererError` naming the extra."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingRendererError(
            'resvg_py draws the demo\'s pictures and is not installed: `pip install "neuclip-scale[demo]"`.'
        ) from error
    return resvg_py


def _draw_chunk(icons: Sequence[Icon], size: int) -> list[Picture | str]:
    return [_draw(icon, size) for icon in icons]


def _draw(icon: Icon, size: int) -> Picture | str:
    from PIL import Image

    resvg = import_renderer()
    try:
        svg = svg_document(icon.entry, size)
        png = bytes(resvg.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))
    except (IconError, ValueError) as error:  # resvg's complaints are ValueErrors
        return str(error)
    with Image.open(io.BytesIO(png)) as opened:
        image = opened.convert("RGB")
    if image.size != (size, size):
        return f"drawn at {image.size[0]} x {image.size[1]} instead of {size} x {size}"
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # full colour: icons are all edges
    thumb = np.asarray(image.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX))
    darkest, brightest = image.convert("L").getextrema()
    blank = float(brightest) - float(darkest) < 8
    return Picture(stream.getvalue(), hashlib.sha256(image.tobytes()).hexdigest(), thumb, blank)
