"""CLIPTokenizer against open_clip's SimpleTokenizer, id for id."""

from __future__ import annotations

import html
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ftfy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuclip_scale.config import ConfigError, ModelConfig
from neuclip_scale.models import tokenizer as module
from neuclip_scale.models.tokenizer import CLIPTokenizer, build_tokenizer, repair

CORPUS = [
    "",
    " ",
    "a photo of a cat.",
    "A Photo Of  A\tCAT,\n it's   the dog's; they'll we've I'm you'd don't he're IT'S",
    "Tom &amp; Jerry &lt;3 &amp;amp;lt; caf&eacute; &#128512; &#xD800; &nbsp; x",
    "cafe\u0301 na\u00efve \u0130stanbul STRASSE \u00df \ufb01ne \ufb06 \u1e9e \u017fun it'\u017f",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1fa\U0001f1f8 100% $9.99  #tag",
    "schÃ¶n â€œquotedâ€\x9d l\u2019humanitÃ©",
    "日本語のキャプション 한국어 مرحبا हिन्दी ไทย \u0345\u1fbe ΑΣΑΣ",
    "0123456789 ½ ² Ⅷ ٣ 1e-6 3.14 2x2",
    "\x00\x07\x1b[31mred\x1b[0m \x7f \x85 \u2028 \u00a0 \u200b \ufeff \ufffd",
    "<start_of_text> a <END_OF_TEXT> b!<end_of_text> x<start_of_text>y <start_of_text <|endoftext|>",
    "word " * 200,
    "supercalifragilisticexpialidocious" * 20,
    "!" * 300 + "?!?!?" * 40,
]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Callable[..., Tensor]:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.mark.parametrize("context_length", [77, 16, 2])
def test_corpus_equals_open_clip(reference: Callable[..., Tensor], context_length: int) -> None:
    ours = CLIPTokenizer()(CORPUS, context_length=context_length)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, reference(CORPUS, context_length=context_length))


@given(st.text(max_size=120))
@settings(max_examples=400, deadline=None)
def test_any_text_equals_open_clip(reference: Callable[..., Tensor], text: str) -> None:
    assert torch.equal(CLIPTokenizer()(text), reference(text))


@given(st.text(alphabet=st.characters(max_codepoint=0x17F), max_size=200))
@settings(max_examples=400, deadline=None)
def test_latin_text_equals_open_clip(reference: Callable[..., Tensor], text: str) -> None:
    assert torch.equal(CLIPTokenizer()(text), reference(text))


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=200))
@settings(max_examples=400, deadline=None)
def test_skipping_the_repair_of_plain_ascii_changes_nothing(text: str) -> None:
    assert repair(text) == html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def test_a_long_caption_keeps_its_end_token() -> None:
    tokens = CLIPTokenizer(context_length=8)("one two three four five six seven eight nine")
    assert tokens.shape == (1, 8)
    assert tokens[0, 0] == 49406
    assert tokens[0, -1] == 49407


def test_one_text_or_a_list_and_an_empty_list() -> None:
    tokenizer = CLIPTokenizer()
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
    assert tokenizer([]).shape == (0, 77)


def test_pickled_copy_gives_the_same_ids() -> None:
    tokenizer = CLIPTokenizer(context_length=16)
    data = pickle.dumps(tokenizer)
    assert len(data) < 1000, "the vocabulary should not travel to the workers"
    assert torch.equal(pickle.loads(data)(CORPUS), tokenizer(CORPUS))


def test_the_vocabulary_is_found_without_importing_open_clip() -> None:
    code = (
        "import sys; from neuclip_scale.models.tokenizer import CLIPTokenizer; CLIPTokenizer()('a cat');"
        "assert 'open_clip' not in sys.modules; assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_oversized_or_damaged_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    path = tmp_path / "vocabulary.gz"
    path.write_bytes(gzip.compress(b"version\na b\n"))
    with pytest.raises(ValueError, match="does not hold 48894 merges"):
        module._read_merges(path)
    monkeypatch.setattr(module, "_VOCABULARY_LIMIT", 1000)
    path.write_bytes(gzip.compress(b"0" * 2000))
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        module._read_merges(path)


def test_no_room_for_start_and_end() -> None:
    with pytest.raises(ValueError, match="context_length = 1"):
        CLIPTokenizer()("a cat", context_length=1)


def test_build_tokenizer_takes_the_presets_context() -> None:
    assert build_tokenizer(ModelConfig(preset="demo")).context_length == 16
    assert build_tokenizer(ModelConfig()).context_length == 77
    with pytest.raises(ConfigError, match="there is no such preset"):
        build_tokenizer(ModelConfig(preset="VIT-B-32"))


def test_a_reference_of_thousands_of_digits_is_no_number() -> None:
    """Python refuses to read one; others before and after it stand for what they did."""
    endless = "&#" + "9" * 5000
    for text in (f"a &amp; {endless}; b &#228;", endless, endless.replace("&", "&amp;")):
        assert CLIPTokenizer()([text]).shape == (1, 77)
    assert repair(f"a &amp; {endless}; b &#228;") == "a & \ufffd b ä"
