"""Captions to token ids: CLIP's byte-pair encoding, and the tokenizer of a transformers encoder.

A tokenizer is called with one text or a list and gives ids [N, context_length]. Both kinds can be pickled,
and neither starts threads, so data-loading workers may be forked after use.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ftfy
import regex
import torch
from torch import Tensor

from neuclip_scale.config import ConfigError, ModelConfig
from neuclip_scale.models.presets import get_preset
from neuclip_scale.models.text import encoder_context_length, read_encoder_config

if TYPE_CHECKING:
    import tokenizers

_ENDLESS_REFERENCE = regex.compile(r"&#[0-9]{20,};?")
_VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_LIMIT = 16 * 2**20  # bytes unpacked; the real file has 3.2 MB
_NUM_MERGES = 49152 - 256 - 2
# What transformers saves tokenizers as; a folder with none of these has no tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", ".model")
_START, _END = "<start_of_text>", "<end_of_text>"
# Contractions, runs of letters, single digits, runs of anything else. The same engine as open_clip's, as
# engines differ in their Unicode version and in what ignoring case means for \p{L}.
_WORD = regex.compile(
    rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


class Tokenizer(Protocol):
    """What the data pipeline and the evaluations need of a tokenizer."""

    context_length: int
    vocab_size: int

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Token ids [N, context_length], int64."""
        ...


class CLIPTokenizer:
    """CLIP's byte-pair encoding, equal to open_clip's `SimpleTokenizer`, with the merging done in Rust.

    Texts are repaired (mojibake, HTML entities twice), whitespace is collapsed and letters are lowered. A row
    is the start token, the text, the end token, zeros; a text that is too long loses its tail, never the end
    token.
    """

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length
        self.vocab_size = _NUM_MERGES + 2 * 256 + 2
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Token ids [N, context_length], int64."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        if length < 2:
            raise ValueError(f"context_length = {length}: no room for start and end tokens. Give at least 2.")
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.start_id, *self.encode(text)[: length - 2], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without start and end tokens."""
        words = _WORD.findall(collapse_whitespace(repair(text)).lower())
        return [token for word in words for token in _encode_word(word)]


class HuggingFaceTokenizer:
    """The tokenizer of a transformers encoder, given by its name on the hub or its local folder.

    Texts are repaired and whitespace is collapsed as open_clip does; rows are padded with the tokenizer's own
    padding.
    """

    def __init__(self, name: str, context_length: int) -> None:
        from transformers import AutoTokenizer

        folder = Path(name)
        if folder.is_dir() and not any(file.name.endswith(_TOKENIZER_FILES) for file in folder.iterdir()):
            # transformers would make an empty tokenizer from the encoder's config alone, without a word.
            raise ConfigError(
                "model.text_tower",
                name,
                "the folder has no tokenizer",
                "Save the encoder's tokenizer into it.",
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "model.text_tower",
                name,
                f"transformers finds no tokenizer there ({error})",
                "Save the encoder's tokenizer into its folder.",
            ) from error
        self.context_length = context_length
        self.vocab_size = len(self._tokenizer)
        self.pad_token_id: int | None = self._tokenizer.pad_token_id

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Token ids [N, context_length], int64."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        cleaned = [collapse_whitespace(repair(text)) for text in texts]
        batch = self._tokenizer(cleaned, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(batch["input_ids"], dtype=torch.long).reshape(len(texts), length)


def build_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer of the text tower that `building.build_model` builds for this configuration."""
    context_length = get_preset(config.preset).text.context_length
    if not config.text_tower:
        return CLIPTokenizer(context_length)
    encoder = read_encoder_config(config.text_tower)
    tokenizer = HuggingFaceTokenizer(config.text_tower, encoder_context_length(encoder, context_length))
    if tokenizer.pad_token_id != encoder.pad_token_id or tokenizer.vocab_size > encoder.vocab_size:
        raise ConfigError(
            "model.text_tower",
            config.text_tower,
            f"its tokenizer (padding id {tokenizer.pad_token_id}, {tokenizer.vocab_size} words) does not fit "
            f"its config (padding id {encoder.pad_token_id}, {encoder.vocab_size} words)",
            "Use the tokenizer that the encoder was made with.",
        )
    return tokenizer


def repair(text: str) -> str:
    """Mojibake fixed, HTML entities resolved twice (crawlers often escape twice), ends stripped."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.strip()  # nothing to repair, which holds for most captions and saves most of the time
    return _unescape(_unescape(ftfy.fix_text(text))).strip()


def _unescape(text: str) -> str:
    # No character has so many digits, and Python refuses to read a number of thousands of them.
    return html.unescape(_ENDLESS_REFERENCE.sub("\ufffd", text))


def collapse_whitespace(text: str) -> str:
    """Every run of whitespace as one space, none at the ends."""
    return " ".join(text.split())


@lru_cache(maxsize=2**16)
def _encode_word(word: str) -> tuple[int, ...]:
    # `encode` and never `encode_batch`, which starts threads that do not survive a fork.
    return tuple(_byte_pair_encoder().encode(word, add_special_tokens=False).ids)


@lru_cache(maxsize=1)
def _byte_pair_encoder() -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary, merges = byte_pair_vocabulary()
    encoder = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.add_special_tokens([AddedToken(token, normalized=False) for token in (_START, _END)])
    return encoder


def byte_pair_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's words with their ids, start and end of text last, and the merges in order."""
    merges = _read_merges(_vocabulary_path())
    # The 256 bytes as printable characters in the order of CLIP's vocabulary, then the same as ends of words.
    byte_characters = _byte_characters()
    words = [
        *byte_characters,
        *(f"{c}</w>" for c in byte_characters),
        *(a + b for a, b in merges),
        _START,
        _END,
    ]
    return {word: index for index, word in enumerate(words)}, merges


def _vocabulary_path() -> Path:
    """CLIP's vocabulary inside the installed open_clip_torch, found without its slow import."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("CLIP's vocabulary comes with open_clip: pip install 'open_clip_torch>=3.0'.")
    path = Path(spec.submodule_search_locations[0]) / _VOCABULARY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: CLIP's vocabulary is missing. Reinstall open_clip_torch>=3.0.")
    return path


def _read_merges(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path) as file:
        data = file.read(_VOCABULARY_LIMIT + 1)
    if len(data) > _VOCABULARY_LIMIT:
        raise ValueError(f"{path}: unpacks to more than {_VOCABULARY_LIMIT} bytes. Reinstall open_clip_torch.")
    lines = data.decode("utf-8").split("\n")[1 : _NUM_MERGES + 1]  # the first line is a version
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) != _NUM_MERGES or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path}: does not hold {_NUM_MERGES} merges. Reinstall open_clip_torch>=3.0.")
    return [(pair[0], pair[1]) for pair in pairs]


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes: first those that print as themselves, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
