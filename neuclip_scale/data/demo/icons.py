"""Iconify's JSON format: the icons, aliases and defaults of one set, and an icon as a stand-alone, bounded
SVG.

Format: https://iconify.design/docs/types/iconify-json.html (the package @iconify/types).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip_scale.data.demo.sources import Source

MAX_BODY_CHARS = 400_000
MAX_SIDE = 4096.0
MAX_ALIAS_DEPTH = 8

_FORBIDDEN = re.compile(
    r"<\s*(?:image|foreignObject|script|style)\b|<!|<\?"  # pictures, HTML, code, imports, entities
    r"|\bhref\s*=\s*[\"'](?!#)"  # a reference that leaves the document
    r"|\burl\(\s*[\"']?(?!#|&quot;#)",
    re.IGNORECASE,
)


class IconError(ValueError):
    """An icon, or a whole set, that cannot be used; the message says why."""


@dataclass(frozen=True)
class Icon:
    """One picture: `entry` is iconify's icon with the set's defaults, `code` its Unicode sequence ("" if
    unknown).
    """

    source: str
    name: str
    entry: Mapping[str, Any]
    code: str = ""
    category: str = ""


@dataclass(frozen=True)
class IconSet:
    """The visible icons of one package, in the order of its file, and what it says about itself."""

    source: Source
    title: str
    author: str
    author_url: str
    licence: str
    licence_url: str
    icons: tuple[Icon, ...]
    synonyms: Mapping[str, str]
    """Alias -> icon name, for aliases that show the same picture."""


def read_icon_set(package: Path, source: Source) -> IconSet:
    """Read `package`, the folder of one npm package; raises `IconError` when it is not the pinned one."""
    raw = (package / "icons.json").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != source.icons_sha256:
        raise IconError(
            f"{package / 'icons.json'}: sha256 {digest} is not the pinned {source.icons_sha256} of "
            f"{source.package}@{source.version}; delete the cache folder and fetch again"
        )
    info = json.loads((package / "info.json").read_bytes())
    author, licence = info.get("author", {}), info["license"]
    icons, synonyms = _read_icons(json.loads(raw), source, package)
    return IconSet(
        source=source,
        title=str(info["name"]),
        author=str(author.get("name", "")),
        author_url=str(author.get("url", "")),
        licence=str(licence.get("spdx") or licence["title"]),
        licence_url=str(licence.get("url", "")),
        icons=tuple(icons),
        synonyms=synonyms,
    )


def _read_icons(values: Mapping[str, Any], source: Source, package: Path) -> tuple[list[Icon], dict[str, str]]:
    """Visible icons, among them aliases that mirror or turn one, and the aliases that only rename one."""
    defaults = {key: values[key] for key in ("left", "top", "width", "height") if key in values}
    codes = {name: code for code, name in _read_optional(package / "chars.json").items()}
    categories = {
        name: category
        for category, names in _read_optional(package / "metadata.json").get("categories", {}).items()
        for name in names
    }
    icons: list[Icon] = []
    synonyms: dict[str, str] = {}
    for name, entry, parent in _entries(values):
        if parent and not any(entry.get(key) for key in ("hFlip", "vFlip", "rotate")):
            synonyms[name] = parent
        elif not entry.get("hidden"):  # hidden: kept by iconify for old users only
            code, category = codes.get(name, ""), categories.get(name, "")
            icons.append(Icon(source.name, name, {**defaults, **entry}, code, category))
    return icons, synonyms


def svg_document(entry: Mapping[str, Any], render_size: int) -> str:
    """A stand-alone SVG of `render_size` pixels square with the icon centred in it; `currentColor` is black.

    Raises `IconError` for a body that is missing, oversized or refers to anything outside itself, and for
    impossible dimensions. What is left is self-contained; the pinned hash of its set vouches for the rest.
    """
    body = entry.get("body")
    if not isinstance(body, str) or not body.strip():
        raise IconError("it has no body")
    if len(body) > MAX_BODY_CHARS:
        raise IconError(f"its body has {len(body)} characters, more than {MAX_BODY_CHARS}")
    refused = _FORBIDDEN.search(body)
    if refused:
        raise IconError(f"it contains {refused.group(0)!r}, which may reach outside the picture")
    left, top = (_number(entry, key, 0.0) for key in ("left", "top"))
    width, height = (_number(entry, key, 16.0) for key in ("width", "height"))
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise IconError(f"its size {width:g} x {height:g} is not within (0, {MAX_SIDE:g}]")
    transform = _transform(entry, left, top, width, height)
    if transform:
        body = f'<g transform="{transform}">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{render_size}" height="{render_size}" viewBox="{left:g} {top:g} {width:g} {height:g}" '
        f'color="#000000">{body}</svg>'
    )


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every icon and alias as (name, properties with those of its parents, icon it descends from or "")."""
    icons, aliases = values.get("icons", {}), values.get("aliases", {})
    for name, entry in icons.items():
        yield name, entry, ""
    for name in aliases:
        chain: list[Mapping[str, Any]] = []
        parent = name
        while parent in aliases and len(chain) <= MAX_ALIAS_DEPTH:
            chain.append(aliases[parent])
            parent = str(aliases[parent].get("parent", ""))
        merged = dict(icons.get(parent, {}))
        for link in reversed(chain):
            for key, value in link.items():
                flips = key in ("hFlip", "vFlip")
                merged[key] = bool(merged.get(key)) != bool(value) if flips else value
        yield name, merged, parent


def _number(entry: Mapping[str, Any], key: str, fallback: float) -> float:
    value = entry.get(key, fallback)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise IconError(f"its {key} is {value!r}, not a number")
    return float(value)


def _transform(entry: Mapping[str, Any], left: float, top: float, width: float, height: float) -> str:
    steps = []
    if entry.get("rotate"):
        if width != height:
            raise IconError("a rotated alias of an icon that is not square")
        steps.append(f"rotate({90 * int(entry['rotate'])} {left + width / 2:g} {top + height / 2:g})")
    if entry.get("hFlip"):
        steps.append(f"matrix(-1 0 0 1 {2 * left + width:g} 0)")
    if entry.get("vFlip"):
        steps.append(f"matrix(1 0 0 -1 0 {2 * top + height:g})")
    return " ".join(steps)


def _read_optional(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}
