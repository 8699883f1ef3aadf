"""Shards of drawn pictures (coloured shapes) with sentences about them, for tests and benchmarks."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from neuclip_scale.data.shards import write_shard

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "yellow": (240, 220, 40),
    "purple": (148, 60, 190),
    "orange": (255, 127, 14),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")


def write_synthetic_shards(
    folder: str | os.PathLike[str], num_samples: int, samples_per_shard: int, image_size: int, seed: int
) -> list[str]:
    """Write `num_samples` pairs in img2dataset's layout and return the paths; equal input, equal bytes.

    Captions name the shape, its colour and, but for every third, the background's, so that a model can learn them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, num_samples, samples_per_shard)):
        paths.append(str(folder / f"{number:05d}.tar"))
        count = min(samples_per_shard, num_samples - start)
        write_shard(paths[-1], _samples(number, count, image_size, seed))
    return paths


def _samples(shard: int, count: int, image_size: int, seed: int) -> Iterator[dict[str, Any]]:
    for position in range(count):
        key = f"{shard:05d}{position:04d}"
        data, caption = draw_picture(image_size, np.random.default_rng([seed, shard, position]))
        if position % 3 == 0:
            caption = caption.partition(" on ")[0]
        document = {
            "key": key,
            "uid": hashlib.md5(f"{seed}/{key}".encode(), usedforsecurity=False).hexdigest(),
            "caption": caption,
            "status": "success",
            "width": image_size,
            "height": image_size,
        }
        yield {"__key__": key, "jpg": data, "txt": caption, "json": document}


def draw_picture(image_size: int, generator: np.random.Generator) -> tuple[bytes, str]:
    """(JPEG bytes, caption) of one shape on a plain, slightly noisy background."""
    shape = SHAPES[generator.integers(len(SHAPES))]
    colour, ground = (list(COLOURS)[i] for i in generator.permutation(len(COLOURS))[:2])
    noise = generator.integers(-12, 13, (image_size, image_size, 3))
    pixels = np.clip(np.asarray(COLOURS[ground]) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    radius = image_size * generator.uniform(0.2, 0.35)
    x, y = generator.uniform(radius, image_size - radius, 2)
    _draw_shape(ImageDraw.Draw(image), shape, x, y, radius, COLOURS[colour])
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92)
    return stream.getvalue(), f"a {colour} {shape} on a {ground} background"


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, y - radius), (x - radius, y), (x, y + radius), (x + radius, y)], fill=fill)
    else:
        arm = radius / 3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
