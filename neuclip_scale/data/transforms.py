"""From a picture to a normalised tensor: open_clip's default crops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neuclip_scale.data.decoding import ImageError, decode_image
from neuclip_scale.data.normalization import Normalization
from neuclip_scale.data.pictures import Picture

_ASPECT_RATIO = (3 / 4, 4 / 3)  # torchvision's default, which open_clip keeps


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (bicubic) and normalisation: open_clip's default augmentation.

    Randomness comes only from the generator that each call is given.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_scale: tuple[float, float] = (0.9, 1.0)

    @property
    def normalization(self) -> Normalization:
        """What makes `__call__`'s result of `pixels`'."""
        return Normalization(self.mean, self.std)

    def __call__(self, image: Image.Image | Picture, generator: np.random.Generator) -> Tensor:
        """[3, image_size, image_size] float32; of an RGB `Image`, exactly what torchvision makes of it."""
        return self.normalization(self.pixels(image, generator))

    def pixels(self, image: Image.Image | Picture, generator: np.random.Generator) -> Tensor:
        """[3, image_size, image_size] uint8. Raises `ImageError` for a `Picture` that cannot be decoded."""
        size, box = self.image_size, random_crop_box(*image.size, self.crop_scale, generator)
        if isinstance(image, Picture):
            return image.resized_crop(box, size)
        # Cropping first: resize(box=...) would let the filter see pixels outside the box.
        return pixels_tensor(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


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
        pixels = pixels_tensor(image.crop((left, top, left + size, top + size)))
        return Normalization(self.mean, self.std)(pixels)


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


def pixels_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] uint8 of an RGB picture."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


__all__ = ["EvalTransform", "ImageError", "TrainTransform", "decode_image"]
