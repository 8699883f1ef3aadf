from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import MEAN, STD
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from neuclip_scale.data.transforms import (
    EvalTransform,
    ImageError,
    TrainTransform,
    decode_image,
    random_crop_box,
)

LIMIT = 50_000_000


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 90, height: int = 60) -> Image.Image:
    """Smooth colours and a hard edge, so that a shift by one pixel shows."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, np.where(x + y > width / 2, 200, 30)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# Decoding


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("BMP", 0), ("WEBP", 12), ("JPEG", 12), ("TIFF", 0)])
def test_formats(kind: str, tolerance: int) -> None:
    image = picture()
    options = {"quality": 95} if tolerance else {}
    assert np.abs(decode(encode(image, kind, **options)) - np.asarray(image)).mean() <= tolerance / 4


def test_palette_and_transparency_go_over_white() -> None:
    image = picture()
    palette = image.quantize(16)
    assert np.array_equal(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    data = encode(palette, "PNG", transparency=palette.getpixel((0, 0)))
    assert decode(data)[0, 0].tolist() == [255, 255, 255]
    alpha = image.copy()
    alpha.putalpha(128)
    half = decode(encode(alpha, "PNG"))
    assert np.abs(half - (np.asarray(image) * (128 / 255) + 127)).max() <= 1
    assert decode(encode(Image.new("LA", (4, 4), (0, 0)), "PNG")).min() == 255
    grey = encode(Image.new("L", (4, 4), 7), "PNG", transparency=7)
    assert decode(grey).min() == 255


def test_cmyk() -> None:
    ours = decode(encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95))[16, 16]
    assert ours[0] > 240
    assert ours[1:].max() < 20


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    rgb = decode(encode(Image.fromarray(ramp), kind))
    assert np.abs(rgb - ramp[..., None] / 257).max() <= 1


def test_bilevel_grey_and_animation() -> None:
    assert set(np.unique(decode(encode(picture().convert("1"), "PNG")))) == {0, 255}
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored)
    assert np.array_equal(decode(data), np.asarray(expected))


def test_a_broken_exif_block_does_not_cost_the_picture() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert decode(data).shape == (60, 90, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"",
        lambda: b"\x89PNG\r\n\x1a\n",
        lambda: encode(picture(), "PNG")[:-60],
        lambda: encode(picture(), "JPEG")[:500],
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        lambda: encode(picture(), "PPM"),
    ],
)
def test_unusable_bytes_are_an_image_error(make: Callable[[], bytes]) -> None:
    with pytest.raises(ImageError, match=r"cannot decode|not a picture") as caught:
        decode_image(make(), LIMIT)
    assert "\n" not in str(caught.value)


def test_random_damage_raises_nothing_else() -> None:
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = np.frombuffer(encode(picture(), kind), dtype=np.uint8)
        for _ in range(60):
            data = whole.copy()
            places = generator.integers(0, len(data), 6)
            data[places] = generator.integers(0, 256, 6)
            try:
                decode_image(data.tobytes(), 1_000_000)
            except ImageError:
                continue


def test_size_is_checked_before_decoding() -> None:
    with pytest.raises(ImageError, match="90x60 pixels, more than the 5399"):
        decode_image(encode(picture(), "PNG")[:200], 5399)


# Transforms


@pytest.mark.parametrize("shape", [(90, 60), (61, 97), (224, 224), (33, 500), (10, 10), (225, 223)])
def test_evaluation_equals_open_clip(shape: tuple[int, int]) -> None:
    import open_clip

    image = picture(*shape)
    theirs = open_clip.image_transform(64, is_train=False, mean=MEAN, std=STD)(image)
    ours = EvalTransform(64, MEAN, STD)(image)
    assert ours.shape == (3, 64, 64)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_training_crop_equals_torchvision_at_the_same_box() -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    image = picture(300, 200)
    for seed in range(20):
        left, top, right, bottom = random_crop_box(300, 200, (0.3, 1.0), np.random.default_rng(seed))
        box = (top, left, bottom - top, right - left)
        crop = tv.resized_crop(image, *box, [48, 48], InterpolationMode.BICUBIC)
        theirs = tv.normalize(tv.to_tensor(crop), list(MEAN), list(STD))
        ours = TrainTransform(48, MEAN, STD, (0.3, 1.0))(image, np.random.default_rng(seed))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(300, 200), (64, 64), (40, 400), (400, 30), (2, 3)])
def test_crop_boxes_are_distributed_as_torchvisions(shape: tuple[int, int]) -> None:
    width, height = shape
    generator = np.random.default_rng(0)
    ours = np.array([random_crop_box(width, height, (0.4, 1.0), generator) for _ in range(4000)], dtype=float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    rows = [RandomResizedCrop.get_params(image, [0.4, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in rows], dtype=float)
    for box in (ours, theirs):
        assert (box[:, :2] >= 0).all()
        assert (box[:, 2] <= width).all()
        assert (box[:, 3] <= height).all()
    scale = np.array([width, height, width, height])
    assert np.abs((ours.mean(0) - theirs.mean(0)) / scale).max() < 0.02
    assert np.abs((ours.std(0) - theirs.std(0)) / scale).max() < 0.02


def test_augmentation_depends_on_the_generator_alone() -> None:
    transform = pickle.loads(pickle.dumps(TrainTransform(32, MEAN, STD, (0.4, 1.0))))
    image = picture()
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((3, 32, 32), torch.float32, True)


def test_an_extreme_shape_stays_small() -> None:
    for shape in ((1, 3_000_000), (3_000_000, 1)):
        assert EvalTransform(224, MEAN, STD)(Image.new("RGB", shape)).shape == (3, 224, 224)
        assert TrainTransform(224, MEAN, STD)(Image.new("RGB", shape), np.random.default_rng(0)).shape[1] == 224
