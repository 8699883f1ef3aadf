"""From hostile bytes to an upright RGB picture, by Pillow and completely."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow knows formats that start other programs (EPS) or that nobody trains on; only these are tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """Bytes that are no usable picture; the message is the reason, in one line."""


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode to an upright RGB picture: transparency over white, 16-bit grey scaled to 8 bits, EXIF applied.

    The size is checked before anything is decoded. Raises `ImageError` for more than `max_pixels` pixels and
    for any bytes that Pillow cannot decode completely.
    """
    with image_errors(), open_image(data, max_pixels) as image:
        image.load()
        rgb, method = to_rgb(image), _TRANSPOSITIONS.get(orientation_of(image))
        return rgb if method is None else rgb.transpose(method)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The picture with its header read and nothing decoded; call it within `image_errors`."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(*image.size, max_pixels)
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise `ImageError` for more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise ImageError(f"{width}x{height} pixels, more than the {max_pixels} allowed")


@contextmanager
def image_errors(*, warned: bool = True) -> Iterator[None]:
    """Whatever Pillow raises inside comes out as `ImageError`, except MemoryError; if `warned` also what it warns of as
    a bomb, half as large as what it refuses.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line for each odd EXIF block would bury the log
            if warned:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # whose text is an address in memory, another one each time
        raise ImageError(f"not a picture in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # hostile bytes make Pillow raise nearly every built-in type
        raise ImageError(f"cannot decode image: {type(error).__name__}: {error}".split("\n")[0]) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The loaded picture as 8-bit RGB; transparency over white, 16-bit grey scaled."""
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits to white
        values = np.asarray(image).astype(np.int64)
        grey = np.clip(values, 0, 65535) * 255 // 65535
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 where there is none."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block, which raises anything, says nothing against the pixels
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1
