"""What a sample must be to be kept. Each filter is a condition on one row; several are joined by "and"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neuclip_scale.subset.errors import UsageError

Arch = Literal["b32", "l14"]
PACKAGED_NAMES = "imagenet21k"
FilterName = Literal[
    "no_filter",
    "basic_filter",
    "clip_score",
    "laion2b",
    "text_based",
    "image_based",
    "image_based_intersect_clip_score",
]
"""What the command line calls the filters, as DataComp's does."""


@dataclass(frozen=True)
class BasicFilter:
    """Length of the caption and shape of the picture; the defaults are DataComp's."""

    min_words: int = 3
    """Words as `str.split` finds them."""
    min_chars: int = 6
    """Code points."""
    min_side: int = 200
    """Pixels of the smaller side of the original picture."""
    max_aspect: float = 3.0
    """Longer side over smaller side."""

    name = "basic"

    def check(self) -> None:
        """Raise `UsageError` for a limit that is none."""
        for option in ("min_words", "min_chars", "min_side"):
            if getattr(self, option) < 0:
                raise UsageError(f"--{option.replace('_', '-')} {getattr(self, option)}: give 0 or more.")
        if not self.max_aspect >= 1.0:
            raise UsageError(f"--max-aspect {self.max_aspect}: give 1 or more, longer side over smaller side.")


@dataclass(frozen=True)
class CaptionFilter:
    """What DataComp asks of a caption before it looks at the picture's cluster."""

    min_tokens: int = 2
    """Words as fasttext finds them: parts between ASCII's blanks, and each line feed is one more."""
    min_chars: int = 6
    """Code points."""

    name = "caption"

    def check(self) -> None:
        """Raise `UsageError` for a limit that is none."""
        if self.min_tokens < 0 or self.min_chars < 0:
            raise UsageError(f"captions of {self.min_tokens} tokens, {self.min_chars} characters: give 0 or more.")


@dataclass(frozen=True)
class EnglishFilter:
    """The caption's language, by fasttext's lid.176 or by a column of the pool."""

    model: Path | None = None
    """lid.176.bin, say; None takes the lid.176.ftz of the extra `language`."""
    column: str = ""
    """A column that names the language, instead of a model."""
    language: str = "en"

    name = "english"

    def check(self) -> None:
        """Raise `UsageError` for a model that is not there, or a model and a column."""
        if self.model and self.column:
            raise UsageError("--language-model and --language-column: give one of them.")
        if self.model and not self.model.is_file():
            raise UsageError(f"--language-model {self.model}: there is no such file. Give fasttext's lid.176.bin.")


@dataclass(frozen=True)
class ClipScoreFilter:
    """The similarity of picture and caption that a CLIP model gave."""

    arch: Arch = "l14"
    fraction: float | None = None
    """Keep this share of the whole pool, the highest scores."""
    threshold: float | None = None
    """Keep scores of at least this."""
    ties: Literal["uid", "all"] = "uid"
    """With a fraction f of n rows: `uid` keeps exactly floor(n f), of equal scores the smallest uids; `all` keeps every
    row that scores at least as high as the one after those, as DataComp does."""

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"clip_score_{self.arch}"

    def check(self) -> None:
        """Raise `UsageError` unless exactly one of fraction and threshold is given, and makes sense."""
        if (self.fraction is None) == (self.threshold is None):
            raise UsageError("clip_score: give either --fraction or --threshold.")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise UsageError(f"--fraction {self.fraction}: give a share above 0 and up to 1, as 0.3.")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"--threshold {self.threshold}: give a number, as 0.28.")


@dataclass(frozen=True)
class TextFilter:
    """A word of the caption names a class of ImageNet."""

    wordnet: Path | None = None
    """Folder with WordNet 3.0's index.* and *.exc: words are looked up as DataComp does."""
    synsets: Path | None = None
    """Ids to look for, one a line as n01440764; None takes ImageNet-21k's, which timm carries."""
    names: Path | str | None = None
    """Instead of WordNet: names to look for, one a line, or `imagenet21k` for timm's list."""

    name = "text"

    def check(self) -> None:
        """Raise `UsageError` unless exactly one of WordNet and names is given, and its files are there."""
        if (self.wordnet is None) == (self.names is None):
            raise UsageError(
                "text_based: give --wordnet with the folder of WordNet 3.0 (/usr/share/wordnet of Debian's "
                "wordnet-base, or nltk_data/corpora/wordnet), as DataComp does; or --names with a file of names, one "
                f"a line, or --names {PACKAGED_NAMES}."
            )
        if self.synsets and self.names:
            raise UsageError("--synsets: ids are looked up in WordNet. Give --wordnet, not --names.")
        if self.wordnet and not (self.wordnet / "index.noun").is_file():
            raise UsageError(f"--wordnet {self.wordnet}: has no index.noun. Give WordNet's folder (dict/).")
        for option, path in (("--synsets", self.synsets), ("--names", self.names)):
            if path and path != PACKAGED_NAMES and not Path(path).is_file():
                raise UsageError(f"{option} {path}: there is no such file.")


@dataclass(frozen=True)
class ImageFilter:
    """The picture's embedding is nearest to a centroid that ImageNet's pictures are nearest to."""

    centroids: Path
    """[k, d] .npy."""
    target_embeddings: Path | None = None
    """[m, d] .npy, embeddings of ImageNet's training pictures: their clusters are wanted."""
    clusters: Path | None = None
    """Instead, the numbers of the wanted clusters: .npy, or a text with one a line."""
    embedding: str = "l14_img"
    """Name of the array in the .npz beside each parquet."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where similarities are computed; auto takes CUDA where there is one."""

    name = "image"

    def check(self) -> None:
        """Raise `UsageError` unless the files are there, and exactly one says which clusters."""
        if (self.target_embeddings is None) == (self.clusters is None):
            raise UsageError(
                "image_based: give either --target-embeddings (ImageNet's training pictures, .npy) or --clusters."
            )
        for option in ("centroids", "target_embeddings", "clusters"):
            path = getattr(self, option)
            if path and not path.is_file():
                raise UsageError(f"--{option.replace('_', '-')} {path}: there is no such file.")


Filter = BasicFilter | CaptionFilter | EnglishFilter | ClipScoreFilter | TextFilter | ImageFilter
