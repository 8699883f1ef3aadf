"""Pictures of which only a resized crop is wanted: decoded no larger than that takes."""

from __future__ import annotations

import functools
import logging
import math
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from neuclip_scale.config import ConfigError
from neuclip_scale.data.decoding import (
    ImageError,
    check_size,
    decode_image,
    image_errors,
    open_image,
    orientation_of,
    to_rgb,
)

Decoder = Literal["auto", "turbo", "pillow", "reference"]
Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""

# Other eighths have no SIMD code in libjpeg-turbo: slower than decoding everything.
_REDUCTIONS = (8, 4, 2)
_TURBO_COLOURS = ("YCbCr", "Gray", "RGB")

logger = logging.getLogger(__name__)


class Picture:
    """An encoded picture whose header was read; `size` is its upright (width, height)."""

    def __init__(self, stored_size: tuple[int, int], orientation: int) -> None:
        self._stored_size, self._orientation = stored_size, orientation
        self.size = stored_size[::-1] if orientation >= 5 else stored_size

    def resized_crop(self, box: Box, size: int) -> Tensor:
        """[3, size, size] uint8: the part `box` of the upright picture, resized by an antialiased bicubic filter.

        A JPEG is decoded at 1/2, 1/4 or 1/8 where the crop still has `size` pixels a side, its edges then rounded
        to whole pixels of the smaller picture. Raises `ImageError` for bytes that cannot be decoded completely.
        """
        box = _stored_box(box, self._stored_size, self._orientation)
        reduction, (left, top, right, bottom) = _reduced(box, size)
        pixels, divisor = self._pixels(reduction)
        if divisor != reduction:  # only JPEG has smaller versions of itself
            left, top, right, bottom = box
        # The axis of batches comes before the permutation: so torch sees channels-last pixels, its fast road.
        crop = torch.from_numpy(pixels)[None, top:bottom, left:right].permute(0, 3, 1, 2)
        resized = interpolate(crop, (size, size), mode="bicubic", antialias=True)[0].contiguous()
        return _upright(resized, self._orientation)

    def _pixels(self, reduction: int) -> tuple[np.ndarray, int]:
        """([h, w, 3] uint8 as stored, what its sides were divided by: `reduction` or 1)."""
        raise NotImplementedError


class _PillowPicture(Picture):
    def __init__(self, image: Image.Image) -> None:
        if image.format != "JPEG":
            image.load()  # TIFF turns itself upright in doing so, PNG may have its EXIF block at the end
        super().__init__(image.size, orientation_of(image))
        self._image = image

    def _pixels(self, reduction: int) -> tuple[np.ndarray, int]:
        width, height = self._stored_size
        reduced = -(-width // reduction), -(-height // reduction)
        with image_errors(), self._image as image:
            if reduction > 1 and image.format == "JPEG":
                image.draft(None, (width // reduction, height // reduction))
            image.load()
            return np.array(to_rgb(image)), reduction if image.size == reduced else 1


class _TurboPicture(Picture):
    def __init__(self, data: bytes, stored_size: tuple[int, int], orientation: int, max_pixels: int) -> None:
        super().__init__(stored_size, orientation)
        self._data, self._max_pixels = data, max_pixels

    def _pixels(self, reduction: int) -> tuple[np.ndarray, int]:
        turbo, (width, height) = _turbo(), self._stored_size
        assert turbo is not None
        least = {"min_width": -(-width // reduction), "min_height": -(-height // reduction)}
        try:
            return turbo.decode_jpeg(self._data, **least), reduction
        except ValueError:  # damaged: Pillow decides whether it is usable, so that this depends on no decoder
            with image_errors():
                fallback = _PillowPicture(open_image(self._data, self._max_pixels))
            if fallback._stored_size != self._stored_size:
                raise ImageError(
                    f"cannot decode image: {self._stored_size} or {fallback._stored_size} pixels"
                ) from None
            return fallback._pixels(reduction)


def open_picture(data: bytes, max_pixels: int, decoder: Decoder) -> Picture | Image.Image:
    """The picture in `data`, its size checked before anything is decoded.

    `reference` decodes completely, here and now. Raises `ImageError` for more than `max_pixels` pixels and for bytes
    that are no picture; a picture whose pixels are damaged may raise it only when they are asked for.
    """
    if decoder == "reference":
        return decode_image(data, max_pixels)
    if decoder != "pillow" and (picture := _open_turbo(data, max_pixels)) is not None:
        return picture
    with image_errors():
        return _PillowPicture(open_image(data, max_pixels))


def log_decoder(decoder: Decoder) -> None:
    """Log which library decodes; raises ConfigError if `decoder` asks for one that is not installed."""
    if decoder == "turbo" and _turbo() is None:
        raise ConfigError(
            "data.decoder", decoder, "simplejpeg is not installed", "pip install simplejpeg, or take auto or pillow."
        )
    if decoder == "auto" and _turbo() is None:
        logger.warning("simplejpeg is not installed: Pillow decodes JPEG, more slowly; pip install simplejpeg")
    elif decoder in ("auto", "turbo"):
        logger.info("JPEG is decoded by simplejpeg (libjpeg-turbo), other formats by Pillow")
    else:
        logger.info("pictures are decoded by Pillow%s", ", completely" if decoder == "reference" else "")


@functools.cache
def _turbo() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:  # no wheel for this machine
        return None
    return simplejpeg


def _open_turbo(data: bytes, max_pixels: int) -> _TurboPicture | None:
    """None for what is better left to Pillow: other formats, CMYK, a damaged header, sizes that Pillow refuses."""
    turbo = _turbo()
    if turbo is None or data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = turbo.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in _TURBO_COLOURS or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    check_size(width, height, max_pixels)
    orientation = 1
    if b"Exif\0\0" in data or b"tiff:Orientation" in data:  # the two places that Pillow looks at
        with image_errors(), open_image(data, max_pixels) as image:
            orientation = orientation_of(image)
    return _TurboPicture(data, (width, height), orientation, max_pixels)


def _reduced(box: Box, size: int) -> tuple[int, Box]:
    """The largest reduction that leaves `size` pixels a side of `box`, and the box in it."""
    for reduction in _REDUCTIONS:
        left, top, right, bottom = ((2 * edge + reduction) // (2 * reduction) for edge in box)  # rounded
        if min(right - left, bottom - top) >= size:
            return reduction, (left, top, right, bottom)
    return 1, box


def _stored_box(box: Box, stored_size: tuple[int, int], orientation: int) -> Box:
    """Where `box` of the upright picture lies in the picture as it is stored."""
    left, top, right, bottom = box
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    width, height = stored_size
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """[3, s, s] as stored -> upright."""
    flipped = [axis for axis, those in ((2, (2, 3, 7, 8)), (1, (3, 4, 6, 7))) if orientation in those]
    pixels = pixels.flip(flipped) if flipped else pixels
    return pixels.transpose(1, 2).contiguous() if orientation >= 5 else pixels
