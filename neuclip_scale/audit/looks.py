"""What a picture looks like, in a few numbers that survive another compression or size.

Two perceptual hashes of 64 bits each, from the library imagehash: `phash` takes the signs of the lowest frequencies of
a cosine transform, `dhash` compares neighbouring pixels of a tiny copy. They fail for different pictures: phash where
few frequencies are there (a drawing on white), dhash where a tiny copy shows little; so their bits are counted
together. whash, from wavelets, takes five times as long as phash. Hashes see grey only, and nothing in a picture of one
flat colour: the mean colour is kept beside them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from neuclip_scale.audit.errors import AuditError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Look:
    """A decoded picture."""

    width: int
    height: int
    pixel_hash: str
    """32 hexadecimal digits of the size and every decoded pixel: equal for equal pixels in other bytes."""
    phash: int
    """Hashes are signed 64-bit numbers, for engines know no others."""
    dhash: int
    red: int
    """Means, 0 to 255."""
    green: int
    blue: int


def look_of(image: Image) -> Look:
    """The look of an upright RGB picture of at least one pixel; raises `AuditError` without imagehash."""
    from PIL import ImageStat

    imagehash = _imagehash()
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)  # [h, w, 3] uint8
    red, green, blue = (round(mean) for mean in ImageStat.Stat(image).mean)
    grey = image.convert("L")
    phash, dhash = _signed(imagehash.phash(grey)), _signed(imagehash.dhash(grey))
    return Look(image.width, image.height, digest.hexdigest(), phash, dhash, red, green, blue)


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError as error:
        raise AuditError(f"--deep needs the extra `audit`: pip install 'neuclip-scale[audit]' ({error})") from error
    return imagehash


def _signed(found: Any) -> int:
    """The bits of an imagehash as one number, the first of them its sign."""
    return int.from_bytes(np.packbits(found.hash).tobytes(), "big", signed=True)
