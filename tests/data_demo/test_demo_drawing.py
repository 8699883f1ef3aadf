"""Icons to pictures: bounds, refusals, and real drawings checked pixel by pixel."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from demo_helpers import make_icon
from PIL import Image

from neuclip_scale.data.demo.icons import MAX_BODY_CHARS, IconError, read_icon_set, svg_document
from neuclip_scale.data.demo.rasterise import Picture, rasterise
from neuclip_scale.data.demo.sources import SOURCES

pytest.importorskip("resvg_py", reason="the extra `demo` is not installed")

LEFT_HALF = '<rect x="0" y="0" width="5" height="10" fill="#ff0000"/>'


def draw(*icons: object) -> list[Picture | str]:
    return list(rasterise(icons, 32, 1))  # type: ignore[arg-type]


def pixels(picture: Picture | str) -> np.ndarray:
    assert isinstance(picture, Picture), picture
    return np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("RGB")).astype(int)


def test_left_half_is_red_on_white_and_mirrors() -> None:
    plain, flipped = draw(make_icon(LEFT_HALF), make_icon(LEFT_HALF, hFlip=True))
    for array, red, white in ((pixels(plain), 8, 24), (pixels(flipped), 24, 8)):
        assert np.abs(array[16, red] - (255, 0, 0)).max() < 12
        assert np.abs(array[16, white] - (255, 255, 255)).max() < 12


def test_vertical_flip_and_quarter_turn() -> None:
    top = '<rect x="0" y="0" width="10" height="5" fill="#0000ff"/>'
    flipped, turned = draw(make_icon(top, vFlip=True), make_icon(top, rotate=1))
    assert pixels(flipped)[24, 16, 0] < 20
    assert pixels(flipped)[8, 16, 0] > 235
    assert pixels(turned)[16, 24, 0] < 20
    assert pixels(turned)[16, 8, 0] > 235


def test_wide_icon_is_centred_and_current_color_is_black() -> None:
    (picture,) = draw(make_icon('<rect width="20" height="10" fill="currentColor"/>', width=20))
    array = pixels(picture)
    assert array[16, 16].max() < 12
    assert array[3, 16].min() > 243
    assert array[28, 16].min() > 243


def test_blank_and_broken_are_told() -> None:
    blank, broken = draw(make_icon('<rect width="10" height="10" fill="#fff"/>'), make_icon("<path d='M0 0' "))
    assert isinstance(blank, Picture)
    assert blank.blank
    assert isinstance(broken, str)


@pytest.mark.parametrize(
    "body",
    [
        '<image href="file:///etc/passwd"/>',
        '<use xlink:href="http://example.org/a.svg#b"/>',
        '<use href="other.svg#b"/>',
        '<path fill="url(http://example.org/x)"/>',
        "<style>@import url(x)</style>",
        "<foreignObject/>",
        "<script/>",
        '<!ENTITY a "b">',
        "",
        "x" * (MAX_BODY_CHARS + 1),
    ],
)
def test_refused_bodies(body: str) -> None:
    with pytest.raises(IconError):
        svg_document({"body": body}, 32)


@pytest.mark.parametrize(
    "entry", [{"width": 0}, {"height": 1e9}, {"width": "10"}, {"left": float("nan")}, {"width": True}]
)
def test_refused_dimensions(entry: dict[str, object]) -> None:
    with pytest.raises(IconError):
        svg_document({"body": "<path/>", **entry}, 32)


def test_inner_references_are_allowed() -> None:
    assert "url(#g)" in svg_document({"body": '<path fill="url(#g)"/><use href="#a"/>'}, 32)


def test_processes_draw_the_same_as_one() -> None:
    icons = [make_icon(f'<circle cx="5" cy="5" r="{1 + i % 7}" fill="#{i:06x}"/>') for i in range(1600)]
    alone, together = list(rasterise(icons, 16, 1)), list(rasterise(icons, 16, 2))
    assert [p.jpeg for p in alone if isinstance(p, Picture)] == [p.jpeg for p in together if isinstance(p, Picture)]


def test_another_package_than_the_pinned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "icons.json").write_text(json.dumps({"icons": {}}))
    with pytest.raises(IconError, match="is not the pinned"):
        read_icon_set(tmp_path, SOURCES[0])
