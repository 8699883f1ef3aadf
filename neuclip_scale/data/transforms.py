"""From image bytes to a normalised tensor: a careful decoder, and open_clip's default crops."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# Pillow knows formats that start other programs (EPS) or that nobody trains on; only these are tried.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ASPECT_RATIO = (3 / 4, 4 / 3)  # torchvision's default, which open_clip keeps


class ImageError(ValueError):
    """Bytes that are no usable picture; the message is the reason, in one line."""


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode to an upright RGB picture: transparency over white, 16-bit grey scaled to 8 bits, EXIF applied.

    The size is checked before anything is decoded. Raises `ImageError` for more than `max_pixels` pixels and
    for any bytes that Pillow cannot decode completely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line for each odd EXIF block would bury the log
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise ImageError(f"{width}x{height} pixels, more than the {max_pixels} allowed")
                image.load()
                return _upright(image, _to_rgb(image))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # whose text is an address in memory, another one each time
        raise ImageError(f"not a picture in one of the formats {', '.join(_FORMATS)}") from error
    except Exception as error:  # hostile bytes make Pillow raise nearly every built-in type
        raise ImageError(f"cannot decode image: {type(error).__name__}: {error}".split("\n")[0]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits to white
        values = np.asarray(image).astype(np.int64)
        grey = np.clip(values, 0, 65535) * 255 // 65535
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _upright(source: Image.Image, rgb: Image.Image) -> Image.Image:
    try:
        method = _ORIENTATIONS.get(source.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block, which raises anything, says nothing against the pixels
        method = None
    return rgb if method is None else rgb.transpose(method)


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (bicubic) and normalisation: open_clip's default augmentation.

    Randomness comes only from the generator that each call is given.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_scale: tuple[float, float] = (0.9, 1.0)

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """[3, image_size, image_size] float32 of an RGB picture."""
        box = random_crop_box(*image.size, self.crop_scale, generator)
        # Cropping first: resize(box=...) would let the filter see pixels outside the box.
        image = image.crop(box).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return normalized_tensor(image, self.mean, self.std)


@dataclass(frozen=True)
class EvalTransform:
    """Shortest side to `image_size` (bicubic), centre crop, normalisation: open_clip's at evaluation."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        """[3, image_size, image_size] float32 of an RGB picture; nothing is drawn from `generator`."""
        image = _without_extreme_ratio(image)
        size, (width, height) = self.image_size, image.size
        # torchvision's rounding, so that scores agree: the long side rounded down, the crop's corner to even.
        if width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return normalized_tensor(image.crop((left, top, left + size, top + size)), self.mean, self.std)


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels, as torchvision's RandomResizedCrop draws it.

    Area uniform in `scale`, log of the aspect ratio uniform; after ten misses the largest centred crop whose
    ratio is allowed.
    """
    low, high = (math.log(ratio) for ratio in _ASPECT_RATIO)
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * generator.random())
        ratio = math.exp(low + (high - low) * generator.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, _ASPECT_RATIO[0]), _ASPECT_RATIO[1])
    w = max(1, min(width, round(height * ratio)))
    h = max(1, min(height, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _without_extreme_ratio(image: Image.Image, limit: int = 32) -> Image.Image:
    """A 1 x 50,000,000 picture would grow to 224 x 11,200,000,000 before its centre is cut out."""
    width, height = image.size
    w, h = min(width, limit * height), min(height, limit * width)
    left, top = (width - w) // 2, (height - h) // 2
    return image if (w, h) == image.size else image.crop((left, top, left + w, top + h))


def normalized_tensor(image: Image.Image, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(pixel / 255 - mean) / std of an RGB picture: [3, H, W] float32."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)  # [3, H, W]
    tensor = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return tensor.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


__all__ = ["EvalTransform", "ImageError", "TrainTransform", "decode_image", "normalized_tensor"]
