"""Small pictures that look unlike each other, and what may become of a picture on a web server."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

Encoded = bytes


def picture(seed: int) -> Image.Image:
    """A picture of smooth colours and some shapes, 150 to 260 pixels a side."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(150, 261, size=2))
    coarse = random.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = int(random.integers(0, width - 30)), int(random.integers(0, height - 30))
        right, bottom = left + int(random.integers(20, 90)), top + int(random.integers(20, 90))
        shape = (draw.ellipse, draw.rectangle)[int(random.integers(0, 2))]
        shape((left, top, right, bottom), fill=tuple(int(value) for value in random.integers(0, 256, size=3)))
    return image


def jpeg(image: Image.Image, quality: int = 92, comment: bytes = b"") -> Encoded:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, comment=comment)
    return stream.getvalue()


def png(image: Image.Image) -> Encoded:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def opened(data: Encoded) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def rewrapped(data: Encoded) -> Encoded:
    """The same pixels in other bytes: a comment put behind the JPEG's first marker."""
    assert data[:2] == b"\xff\xd8"
    return data[:2] + b"\xff\xfe\x00\x0bhosted by" + data[2:]


def recompressed(data: Encoded, quality: int = 55) -> Encoded:
    return jpeg(opened(data), quality)


def resized(data: Encoded, scale: float = 0.7) -> Encoded:
    image = opened(data)
    return jpeg(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS))


def corrupt(data: Encoded) -> Encoded:
    """The start of a picture, and noise where its frame should be."""
    return data[:20] + bytes(range(256)) * 4


def placeholder() -> Encoded:
    """What a picture host shows in place of a picture that it lost."""
    image = Image.new("RGB", (200, 160), (225, 225, 225))
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 50, 160, 110), outline=(120, 120, 120), width=6)
    draw.line((40, 50, 160, 110), fill=(120, 120, 120), width=5)
    return png(image)
