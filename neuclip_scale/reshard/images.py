"""What may be done to pictures on the way: blurring of faces, resizing, encoding anew."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuclip_scale.reshard.errors import UsageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 1 << 28
"""Larger pictures are refused before they are decoded."""

_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
}
"""Of Pillow, that a format can hold."""
_COLOURS = {"L": b"GRAY", "LA": b"GRAY", "RGB": b"RGB ", "RGBA": b"RGB ", "P": b"RGB ", "CMYK": b"CMYK"}
"""What a colour profile says that it is for, by Pillow's modes."""
_QUALITY = 95
_MARGIN = 0.1
"""Of a box's longer side: how far the blur reaches beyond the box, and its standard deviation."""

_FARTHEST = 100.0
"""Of a box's corner, in sides of the picture."""

Box = tuple[float, float, float, float]


class ImageError(ValueError):
    """A picture or its boxes that cannot be used."""


@dataclass(frozen=True)
class ImageWork:
    """What to do; the default is nothing, and pictures are copied as they are."""

    resize: int = 0
    """Shorter side in pixels; larger pictures are made smaller, none larger."""
    encode: str = ""
    """FORMAT or FORMAT:QUALITY, as `webp:90`; empty keeps each picture's format."""
    blur_faces: bool = False
    """Blur the json's `face_bboxes`, normalised [x1, y1, x2, y2] as DataComp's."""

    def __bool__(self) -> bool:
        return bool(self.resize or self.encode or self.blur_faces)

    def check(self) -> None:
        """Raises `UsageError` for what cannot be done."""
        if self.resize < 0:
            raise UsageError(f"--resize {self.resize}: give the shorter side in pixels.")
        name, quality = self._format()
        if self.encode and (name not in _FORMATS or not 1 <= quality <= 100):
            raise UsageError(f"--encode {self.encode!r}: give jpg, webp or png, and a quality of 1 to 100: webp:90.")

    def _format(self) -> tuple[str, int]:
        name, _, quality = self.encode.lower().partition(":")
        return name, int(quality) if quality.isdigit() else (-1 if quality else _QUALITY)

    def apply(self, extension: str, data: bytes, boxes: Sequence[Box]) -> tuple[str, bytes]:
        """Extension and bytes of the picture afterwards; unchanged bytes if there is nothing to do.

        Raises `ImageError` for what does not decode.
        """
        from neuclip_scale.data import decoding

        try:
            with decoding.image_errors(warned=False), decoding.open_image(data, MAX_PIXELS) as picture:
                shrink = 0 < self.resize < min(picture.size)
                if not (shrink or self.encode or boxes):
                    return extension, data
                done: Any = _as_one_of(picture, ("L", "RGB", "RGBA")) if boxes else picture.copy()
                done = blur(done, boxes) if boxes else done
                done = _shrunk(done, self.resize) if shrink else done
                name, quality = self._format() if self.encode else (extension, _QUALITY)
                return name, _encoded(done, _FORMATS[name], quality, picture)
        except decoding.ImageError as error:
            raise ImageError(str(error)) from error


def face_boxes(raw: bytes) -> list[Box] | None:
    """The `face_bboxes` of a json member, None where it has none. Raises `ImageError` for other than boxes."""
    try:
        boxes = json.loads(raw).get("face_bboxes")
        if boxes is None:
            return None
        found = [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in boxes]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ImageError(f"face_bboxes: {error}") from error
    if not all(abs(value) <= _FARTHEST for box in found for value in box):  # no NaN either
        raise ImageError(f"face_bboxes: a corner that is not within {_FARTHEST:g} sides of the picture")
    return found


def blur(picture: Any, boxes: Sequence[Box]) -> Any:
    """Blur boxes of a PIL picture, as img2dataset and DataComp do.

    Each box grows by a tenth of its longer side; mask and picture are blurred by a Gaussian of a tenth of the longest
    side of any box, and mixed by the mask.
    """
    from PIL import Image, ImageDraw, ImageFilter

    mask, longest = Image.new("L", picture.size, 0), 0
    for x1, y1, x2, y2 in boxes:
        left, top, right, bottom = (
            int(value * side) for value, side in zip((x1, y1, x2, y2), picture.size * 2, strict=True)
        )
        side = max(right - left, bottom - top)
        longest = max(longest, side)
        grown = (left - _MARGIN * side, top - _MARGIN * side, right + _MARGIN * side - 1, bottom + _MARGIN * side - 1)
        corners = tuple(int(value) for value in grown)
        if corners[2] >= corners[0] and corners[3] >= corners[1]:
            ImageDraw.Draw(mask).rectangle(corners, fill=255)
    gaussian = ImageFilter.GaussianBlur(_MARGIN * longest)
    return Image.composite(picture.filter(gaussian), picture, mask.filter(gaussian))


def _shrunk(picture: Any, shorter: int) -> Any:
    from PIL import Image

    scale = shorter / min(picture.size)
    size = [max(shorter, round(side * scale)) for side in picture.size]
    picture = _as_one_of(picture, ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _as_one_of(picture: Any, modes: Sequence[str]) -> Any:
    """The picture in a mode that is among `modes`, transparent still where one of them can be."""
    from neuclip_scale.data.decoding import to_rgb

    sees_through = picture.has_transparency_data
    by_colour = sees_through and picture.mode not in ("LA", "P", "RGBA")  # which neither blur nor filter respects
    if picture.mode in modes and not by_colour:
        return picture
    # As training sees it: Pillow's own conversion shows what lies under what is transparent, and clips 16 bits.
    return picture.convert("RGBA") if sees_through and "RGBA" in modes else to_rgb(picture)


def _encoded(picture: Any, form: str, quality: int, original: Any) -> bytes:
    """Bytes of `picture`, with `original`'s orientation, and its colour profile if that fits the colours still."""
    picture = _as_one_of(picture, _MODES[form])
    kept = {key: original.info[key] for key in ("exif", "icc_profile") if original.info.get(key)}
    # CMYK, say, may have become RGB. A profile names its colours in bytes 16 to 19 (ICC.1:2022, 7.2).
    if kept.get("icc_profile", b"")[16:20] != _COLOURS.get(picture.mode):
        kept.pop("icc_profile", None)
    if form != "PNG":
        kept["quality"] = quality
    stream = io.BytesIO()
    picture.save(stream, form, **kept)
    return stream.getvalue()
