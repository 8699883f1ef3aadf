"""The fast road from bytes to a resized crop, held against Pillow's full decode and resize."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import MEAN, STD
from PIL import Image

from neuclip_scale.config import ConfigError
from neuclip_scale.data import pictures
from neuclip_scale.data.decoding import ImageError, decode_image
from neuclip_scale.data.pictures import Decoder, Picture, log_decoder, open_picture
from neuclip_scale.data.transforms import TrainTransform

LIMIT = 50_000_000
DECODERS: tuple[Decoder, ...] = ("turbo", "pillow")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise with the spectrum of photographs, about 1/f: fine detail, but not nothing else."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(generator.standard_normal((3, height, width))) / frequency**1.3
    planes = np.fft.irfft2(noise, s=(height, width))
    planes *= np.array([55, 20, 20])[:, None, None] / planes.std(axis=(1, 2), keepdims=True)
    ycc = np.clip(128 + planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(ycc, "YCbCr").convert("RGB")


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **{"quality": 90, **options})
    return stream.getvalue()


def reference(data: bytes, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """[3, size, size] float: cut out of the full decode, resized by Pillow."""
    image = decode_image(data, LIMIT).crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def crop_of(data: bytes, box: tuple[int, int, int, int], size: int, decoder: Decoder) -> torch.Tensor:
    picture = open_picture(data, LIMIT, decoder)
    assert isinstance(picture, Picture)
    crop = picture.resized_crop(box, size)
    assert (crop.dtype, crop.shape, crop.is_contiguous()) == (torch.uint8, (3, size, size), True)
    return crop.float()


def snapped(box: tuple[int, int, int, int], reduction: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = (int(edge / reduction + 0.5) * reduction for edge in box)
    return left, top, right, bottom


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "4:4:4": lambda image: jpeg(image, subsampling=0),
    "4:2:2": lambda image: jpeg(image, subsampling=1),
    "4:2:0": lambda image: jpeg(image, subsampling=2),
    "progressive": lambda image: jpeg(image, progressive=True),
    "restarts": lambda image: jpeg(image, restart_marker_rows=1),
    "grey": lambda image: jpeg(image.convert("L")),
    "cmyk": lambda image: jpeg(image.convert("CMYK")),
    "rgb": lambda image: jpeg(image, keep_rgb=True),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(90, 61), (65, 65), (127, 64), (95, 94)])
def test_without_reduction_pixels_differ_by_rounding_only(shape: tuple[int, int], kind: str, decoder: Decoder) -> None:
    data = KINDS[kind](photograph(*shape))
    width, height = shape
    for box in ((0, 0, width, height), (3, 1, width - 5, height)):
        difference = (crop_of(data, box, 48, decoder) - reference(data, box, 48)).abs()
        assert difference.max() <= 3
        assert difference.mean() <= 0.3


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "reduction"), [((262, 201), 2), ((257, 389), 4), ((900, 801), 8), ((208, 1043), 2)])
def test_reduced_decoding_is_nearly_the_full_one(
    shape: tuple[int, int], reduction: int, kind: str, decoder: Decoder
) -> None:
    """Where the crop's edges lie on the reduced grid, the filters alone differ; most where no pixel is to spare."""
    data = KINDS[kind](photograph(*shape))
    size, (width, height) = 64 if reduction < 8 else 96, shape
    for box in ((0, 0, width, height), (5, 3, width - 6, height - 1)):
        left, top, right, bottom = (edge // reduction * reduction for edge in box)
        box = left, top, right, bottom
        difference = (crop_of(data, box, size, decoder) - reference(data, box, size)).abs()
        assert difference.mean() <= 4
        assert difference.max() <= 32


def test_a_reduced_crop_lies_beside_the_drawn_one_by_half_a_pixel_of_the_result_at_most() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        left, top, w, h, size = (int(number) for number in generator.integers(1, 900, 5))
        box = (left, top, left + w, top + h)
        reduction, reduced = pictures._reduced(box, size)
        assert min(reduced[2] - reduced[0], reduced[3] - reduced[1]) >= size or reduction == 1
        assert max(abs(edge - reduction * at) for edge, at in zip(box, reduced)) <= reduction / 2
    data = jpeg(photograph(803, 603))
    for left, right in ((1, 802), (3, 801), (6, 803)):
        box = (left, 1, right, 602)
        assert (crop_of(data, box, 100, "auto") - reference(data, box, 100)).abs().mean() <= 8


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_smallest_version_that_has_enough_pixels_is_decoded(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    resize = pictures.interpolate

    def spying(image: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(tuple(image.shape[2:]))
        return resize(image, *args, **options)

    monkeypatch.setattr(pictures, "interpolate", spying)
    data = jpeg(photograph(801, 603))
    for size in (303, 302, 151, 75, 10):
        crop_of(data, (0, 0, 801, 603), size, decoder)
    assert seen == [(603, 801), (302, 401), (151, 200), (75, 100), (75, 100)]


@pytest.mark.parametrize("decoder", [*DECODERS, "reference"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [48, 20])
def test_orientation(orientation: int, decoder: Decoder, size: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photograph(90, 62), exif=exif)
    picture = open_picture(data, LIMIT, decoder)
    assert picture.size == ((90, 62) if orientation < 5 else (62, 90))
    box = (4, 8, 60, 56)
    if isinstance(picture, Picture):
        difference = (picture.resized_crop(box, size).float() - reference(data, box, size)).abs()
        assert difference.mean() <= (0.05 if size == 48 else 3)
        assert difference.max() <= (2 if size == 48 else 24)


def test_orientation_is_found_in_xmp_too() -> None:
    xmp = b"<x:xmpmeta><rdf:Description tiff:Orientation='6'/></x:xmpmeta>"
    data = jpeg(photograph(90, 62), xmp=xmp)
    expected = decode_image(data, LIMIT).size
    assert [open_picture(data, LIMIT, decoder).size for decoder in DECODERS] == [expected] * 2


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats(kind: str, decoder: Decoder) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(90, 61).save(stream, kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
    data = stream.getvalue()
    box = (2, 3, 60, 59)
    # A turned picture is resized before it is turned: the filter's two passes round in the other order.
    assert (crop_of(data, box, 24, decoder) - reference(data, box, 24)).abs().max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_other_pixels(mode: str) -> None:
    image = photograph(90, 61)
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image = sixteen if mode == "I;16" else image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = stream.getvalue()
    assert (crop_of(data, (2, 3, 80, 59), 24, "auto") - reference(data, (2, 3, 80, 59), 24)).abs().max() <= 1


# Hostile bytes


@pytest.mark.parametrize("decoder", [*DECODERS, "reference"])
def test_the_size_is_checked_before_decoding(decoder: Decoder) -> None:
    data = jpeg(photograph(90, 60))
    start = data.index(b"\xff\xc0")  # the frame header: length, precision, height, width
    bomb = data[: start + 5] + b"\x1b\x58\x1f\x40" + data[start + 9 :]
    with pytest.raises(ImageError, match="8000x7000 pixels, more than the 50000000"):
        open_picture(bomb, LIMIT, decoder)
    larger = data[: start + 5] + b"\xff\xff\xff\xff" + data[start + 9 :]
    with pytest.raises(ImageError, match="DecompressionBombError"):
        open_picture(larger, 1 << 60, decoder)
    with pytest.raises(ImageError, match="90x60 pixels, more than the 5399"):
        open_picture(data[:700], 5399, decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cut_picture_is_an_image_error(decoder: Decoder) -> None:
    picture = open_picture(jpeg(photograph(90, 60))[:-400], LIMIT, decoder)
    assert isinstance(picture, Picture)
    with pytest.raises(ImageError, match="cannot decode image: OSError: image file is truncated"):
        picture.resized_crop((0, 0, 90, 60), 48)


def test_which_samples_are_usable_depends_on_no_decoder() -> None:
    generator = np.random.default_rng(0)
    usable = []
    for options in ({}, {"progressive": True}, {"subsampling": 0, "restart_marker_rows": 2}):
        whole = np.frombuffer(jpeg(photograph(120, 90), **options), np.uint8)
        for i in range(120):
            data = whole.copy()
            places = generator.integers(0, len(data) if i % 2 else 700, 3)
            data[places] = generator.integers(0, 256, 3)
            data = data[: len(data) if i % 5 else generator.integers(4, len(data))]
            each = {is_usable(data.tobytes(), decoder) for decoder in (*DECODERS, "reference")}
            assert len(each) == 1
            usable += each
    assert 0.3 < np.mean(usable) < 0.8


def is_usable(data: bytes, decoder: Decoder) -> bool:
    try:
        TrainTransform(16, MEAN, STD)(open_picture(data, 1_000_000, decoder), np.random.default_rng(0))
    except ImageError:
        return False
    return True


# Choice of decoder


def test_the_same_crop_is_drawn_for_every_decoder() -> None:
    data = jpeg(photograph(120, 90))
    transform = TrainTransform(48, MEAN, STD, (0.4, 1.0))
    for seed in range(5):
        ours, other, exact = (
            transform(open_picture(data, LIMIT, decoder), np.random.default_rng(seed))
            for decoder in (*DECODERS, "reference")
        )
        assert torch.equal(ours, other)
        assert (ours - exact).abs().max() <= 3.01 / 255 / min(STD)


def test_without_the_library_pillow_decodes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pictures, "_turbo", lambda: None)
    data = jpeg(photograph(90, 60))
    crop = crop_of(data, (0, 0, 90, 60), 48, "auto")
    assert (crop - reference(data, (0, 0, 90, 60), 48)).abs().max() <= 1
    log_decoder("auto")
    assert "simplejpeg is not installed" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.decoder = 'turbo'.*pip install simplejpeg"):
        log_decoder("turbo")
