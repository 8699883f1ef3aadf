"""The table of picture sets: what is fetched, exactly which version, and how its names are to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NameStyle = Literal["emoji", "numbered-emoji", "numbered", "sized", "flags"]
"""How a set names its icons: Unicode's emoji names; these, or other words, with a variant's number or style
at the end; words with a pixel size at the end; two-letter country codes.
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One npm package `@iconify-json/NAME` at one version; `icons_sha256` is of its icons.json."""

    name: str
    version: str
    icons_sha256: str
    style: NameStyle

    @property
    def package(self) -> str:
        """Name of the npm package."""
        return f"@iconify-json/{self.name}"


SOURCES: tuple[Source, ...] = (
    Source(
        name="noto",
        version="1.2.9",
        icons_sha256="9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
        style="emoji",
    ),
    Source(
        name="noto-v1",
        version="1.2.5",
        icons_sha256="ce70d8aa90345cf389875c3571ecd245bd943401822a0c5a0f62336bf8487333",
        style="emoji",
    ),
    Source(
        name="openmoji",
        version="1.2.29",
        icons_sha256="7075331faab544067dbff4236471dd378bb5410aa05799a8a343c9ebf5c5984c",
        style="emoji",
    ),
    Source(
        name="fluent-emoji-flat",
        version="1.2.6",
        icons_sha256="f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
        style="emoji",
    ),
    Source(
        name="emojione",
        version="1.2.3",
        icons_sha256="e9a865faed523a7c3535b5319ae533d09fac1a62b4e96920eb178bb60e707e80",
        style="emoji",
    ),
    Source(
        name="twemoji",
        version="1.2.5",
        icons_sha256="5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
        style="emoji",
    ),
    Source(
        name="streamline-emojis",
        version="1.2.4",
        icons_sha256="d3cb7afee48544af5657a92951cff18ffef7b150a13b3df1bb54b8c0757bfad6",
        style="numbered-emoji",
    ),
    Source(
        name="streamline-color",
        version="1.2.2",
        icons_sha256="c25dd355925b4fde148ec483f5d6ee0aa3cd7a96615c9f0ee7fb7959e0caca83",
        style="numbered",
    ),
    Source(
        name="streamline-plump-color",
        version="1.2.2",
        icons_sha256="1ec76fa9ca951d28f000e2d64b2ad56601969f945c14d23c8e0fe69c73225950",
        style="numbered",
    ),
    Source(
        name="streamline-ultimate-color",
        version="1.2.2",
        icons_sha256="cce247f44063ea88565e23fc016dd6a7fdcc12a49aeaff4b9d29829176f690e7",
        style="numbered",
    ),
    Source(
        name="streamline-kameleon-color",
        version="1.2.2",
        icons_sha256="f348df85668276969c44d1275eea0b28befdb7edb7de15f0a82b33bfbcf46b38",
        style="numbered",
    ),
    Source(
        name="fluent-color",
        version="1.2.21",
        icons_sha256="2a3e9bb2009d1a4c620e76fee74658a78a27c8ae9332830556e9c384ec16e422",
        style="sized",
    ),
    Source(
        name="flat-color-icons",
        version="1.2.3",
        icons_sha256="12c081f1d8870c11b82db6be5e494bdc4b30b1bbf4f5010217a29f42147eddc3",
        style="numbered",
    ),
    Source(
        name="circle-flags",
        version="1.2.11",
        icons_sha256="102f1a60ae4485ec9d61d278ebf22c08920513b4712bf2ac358965502fdec210",
        style="flags",
    ),
)

HELD_OUT = "twemoji"
"""The vendor whose pictures are never trained on: it draws about 1,900 concepts without skin tone, nearly all
of which other vendors draw too, and (unlike noto, whose v1 is a set of its own) no other set here is an
edition of it.
"""

NAMING = ("noto", "twemoji", "openmoji")
"""Sets that say which Unicode sequence each icon shows; the first that knows a sequence names it for every
vendor, so that one concept has one caption. Only names are taken from the held-out vendor, never pictures.
"""
