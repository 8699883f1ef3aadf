"""Work on pictures: faces blurred where DataComp's boxes are, resizing, encoding."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from reshard_helpers import outputs, read_tar, run, uid_of, write_tar

from neuclip_scale.reshard import ImageWork, ReshardError
from neuclip_scale.reshard.images import ImageError, blur, face_boxes


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def gaussian(values: np.ndarray, sigma: float) -> np.ndarray:
    """A true Gaussian, separable, edges repeated."""
    reach = int(np.ceil(4 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(values.ndim)]
        values = np.apply_along_axis(np.convolve, axis, np.pad(values, width, mode="edge"), kernel, "valid")
    return values


def test_blur_is_img2datasets(tmp_path: Path) -> None:
    """The formula of its blurrer in numpy, with a true Gaussian: Pillow's is three box filters."""
    picture, box = noise(120, 90), (0.25, 0.3, 0.6, 0.7)
    left, top, right, bottom = int(0.25 * 120), int(0.3 * 90), int(0.6 * 120), int(0.7 * 90)
    side = max(right - left, bottom - top)
    pixels, mask = np.asarray(picture).astype(float), np.zeros((90, 120, 1))
    grown = [int(v) for v in (left - 0.1 * side, top - 0.1 * side, right + 0.1 * side, bottom + 0.1 * side)]
    mask[grown[1] : grown[3], grown[0] : grown[2]] = 1
    soft = gaussian(mask, 0.1 * side)
    expected = pixels * (1 - soft) + gaussian(pixels, 0.1 * side) * soft
    ours = np.asarray(blur(picture, [box])).astype(float)
    assert np.abs(ours - expected).mean() < 3
    inside = (slice(top + 5, bottom - 5), slice(left + 5, right - 5))
    assert ours[inside].std() < 0.2 * pixels[inside].std()
    assert np.array_equal(ours[:10], pixels[:10])
    assert np.array_equal(ours[:, 90:], pixels[:, 90:])


@pytest.mark.parametrize(
    "boxes", [[(0.0, 0.0, 1.0, 1.0)], [(-0.2, 0.5, 1.4, 1.2)], [(0.5, 0.5, 0.5, 0.5)], [(0.6, 0.6, 0.4, 0.4)]]
)
def test_odd_boxes(boxes: list) -> None:
    assert blur(noise(50, 40), boxes).size == (50, 40)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"face_bboxes": [[1, 2]]}',
        b'{"face_bboxes": 5}',
        b"[]",
        b"{",
        b'{"face_bboxes": [[NaN,0,1,1]]}',
        b'{"face_bboxes": [[0,0,1e308,1]]}',
        b'{"face_bboxes": [[0,0,1e200,1]]}',
        b'{"face_bboxes": [[0,0,1%b,1]]}' % (b"0" * 400),
        b'{"face_bboxes": [], "a": %b%b}' % (b"[" * 100_000, b"]" * 100_000),
    ],
)
def test_broken_boxes_are_an_error(raw: bytes) -> None:
    with pytest.raises(ImageError):
        face_boxes(raw)


def test_boxes() -> None:
    assert face_boxes(b'{"face_bboxes": []}') == []
    assert face_boxes(b"{}") is None


@pytest.mark.parametrize(
    ("work", "extension", "size", "mode"),
    [
        (ImageWork(), "png", (60, 40), "RGB"),
        (ImageWork(resize=20), "png", (30, 20), "RGB"),
        (ImageWork(resize=200), "png", (60, 40), "RGB"),
        (ImageWork(encode="webp:80"), "webp", (60, 40), "RGB"),
        (ImageWork(encode="jpg", resize=10), "jpg", (15, 10), "RGB"),
    ],
)
def test_work(work: ImageWork, extension: str, size: tuple[int, int], mode: str) -> None:
    work.check()
    data = encoded(noise(60, 40))
    name, done = work.apply("png", data, ())
    with Image.open(io.BytesIO(done)) as picture:
        assert (name, picture.size, picture.mode) == (extension, size, mode)
    if name == "png" and size == (60, 40):
        assert done == data


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "LA"])
def test_every_mode_can_be_worked_on(mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    data = encoded(noise(40, 30).convert(mode), form)
    for work in (ImageWork(encode="jpg"), ImageWork(encode="webp"), ImageWork(resize=10)):
        assert work.apply("png", data, [(0.1, 0.1, 0.9, 0.9)])[1]


def test_a_profile_stays_with_its_own_colours_only() -> None:
    """A viewer that holds RGB against a profile for inks shows other colours."""
    of_inks = bytes(16) + b"CMYK" + bytes(108)
    of_light = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    inks = encoded(noise(40, 30).convert("CMYK"), "JPEG", icc_profile=of_inks)
    light, grey = (encoded(noise(40, 30, mode), "JPEG", icc_profile=of_light) for mode in ("RGB", "L"))

    def profile(form: str, data: bytes) -> bytes | None:
        with Image.open(io.BytesIO(ImageWork(encode=form, resize=20).apply("jpg", data, ())[1])) as picture:
            return picture.info.get("icc_profile")

    assert profile("jpg", inks) == of_inks
    assert profile("webp", inks) is None
    assert profile("jpg", light) == profile("webp", light) == of_light
    assert profile("jpg", grey) is None


def shown(data: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert(mode)).astype(int)


def test_what_is_transparent_is_white_in_a_jpeg_and_transparent_elsewhere() -> None:
    """As training decodes it, not the black that lies under it."""
    picture = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    picture.paste((200, 30, 30, 255), (10, 10, 30, 20))
    by_palette, by_colour = picture.quantize(8), Image.new("RGB", (40, 30), (1, 2, 3))
    for data in (
        encoded(picture),
        encoded(by_palette),
        encoded(by_colour, transparency=(1, 2, 3)),
        encoded(picture, "WEBP"),
    ):
        for work in (ImageWork(encode="jpg"), ImageWork(encode="jpg", resize=15)):
            assert shown(work.apply("png", data, ())[1])[0, 0].min() > 245
        for work in (
            ImageWork(encode="webp", resize=15),
            ImageWork(encode="png:90", resize=15),
            ImageWork(encode="webp"),
        ):
            assert shown(work.apply("png", data, ())[1], "RGBA")[0, 0, 3] == 0


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.full((30, 40), 32768, dtype=np.uint16))
    data = encoded(grey)
    for work in (
        ImageWork(encode="jpg"),
        ImageWork(encode="webp"),
        ImageWork(resize=10),
        ImageWork(encode="jpg", resize=10),
    ):
        assert abs(shown(work.apply("png", data, ())[1]).mean() - 127) < 3
    assert ImageWork(encode="png").apply("png", data, ())[0] == "png"


def test_no_picture_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript, whatever its name ends in, to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageError, match="not a picture in one of the formats"):
        ImageWork(encode="jpg").apply("jpg", script, ())
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("encode", ["gif", "jpg:0", "jpg:x", "webp:101"])
def test_what_cannot_be_encoded(encode: str) -> None:
    with pytest.raises(ReshardError, match="--encode"):
        ImageWork(encode=encode).check()


def test_a_pool_with_faces_and_a_broken_picture(tmp_path: Path) -> None:
    picture = noise(100, 80)
    records: list[dict[str, Any]] = [
        {"face_bboxes": [[0.2, 0.2, 0.8, 0.8]]},
        {"face_bboxes": []},
        {},
        {"face_bboxes": []},
    ]
    datas = [encoded(picture), encoded(picture), encoded(picture), b"no picture"]
    rows = [
        (f"00000{i:04d}", {"png": data, "json": json.dumps({"uid": uid_of(str(i)), **record}).encode()})
        for i, (data, record) in enumerate(zip(datas, records))
    ]
    (tmp_path / "pool").mkdir()
    write_tar(tmp_path / "pool/00000.tar", rows)
    common = ["-i", tmp_path / "pool", "-j", 1, "--blur-faces", "--resize", 60]
    assert run(*common, "-o", tmp_path / "out", "--verify") == 1
    assert run(*common, "-o", tmp_path / "again", "--shuffle", "--allow-missing") == 0
    found = read_tar(outputs(tmp_path / "out")[0])
    assert [members["json"] for _, members in found] == [rows[i][1]["json"] for i in range(3)]
    pictures = [np.asarray(Image.open(io.BytesIO(members["png"]))).astype(float) for _, members in found]
    assert pictures[0].shape == (60, 75, 3)
    assert pictures[0][20:40, 25:50].std() < 0.5 * pictures[1][20:40, 25:50].std()
    told = json.loads((tmp_path / "out/reshard.json").read_bytes())["totals"]
    assert (told["written"], told["dropped"], told["without_boxes"]) == (3, 1, 1)
    assert "picture cannot be used" in (tmp_path / "out/corrupt.jsonl").read_text()
