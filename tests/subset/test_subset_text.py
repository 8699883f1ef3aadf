"""Captions: their language by the real model, and words that name a class."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from subset_helpers import expected, row_of, select, uids, write_pool

from neuclip_scale.subset import EnglishFilter, SubsetError, TextFilter, UsageError
from neuclip_scale.subset import entities as entities_module
from neuclip_scale.subset import language as language_module
from neuclip_scale.subset.entities import EntityFinder
from neuclip_scale.subset.wordnet import LONGEST_WORD, WordNet

SENTENCES = [
    ("A golden retriever puppy plays with a ball in the garden", True),
    ("The old stone bridge crosses the river near the village", True),
    ("Fresh vegetables at the farmers market\non a sunny morning", True),
    ("How to paint a wooden chair in three easy steps", True),
    ("Portrait of a young woman wearing a blue hat", True),
    ("Ein kleiner Hund spielt mit einem Ball im Garten", False),
    ("La vieille maison de pierre au bord de la rivière", False),
    ("Un perro pequeño juega con una pelota en el jardín", False),
    ("Маленькая собака бежит по зелёному саду", False),
    ("庭でボールで遊ぶ小さな犬", False),
    ("كلب صغير يلعب بالكرة في الحديقة", False),
    ("Küçük bir köpek bahçede topla oynuyor", False),
    (None, False),
]
INDEX = {
    "noun": [
        "dog n 2 2 @ ~ 2 1 02084071 10114209",
        "axis n 1 1 @ 1 0 00000020",
        "box n 1 1 @ 1 1 00000021",
        "ox n 1 0 1 0 00000022",
        "church n 1 1 @ 1 1 00000023",
        "fireman n 1 3 @ ~ + 1 0 00000024",
        "ice_cream n 1 1 @ 1 0 00000025",
        "s n 1 1 @ 1 0 00000026",
    ],
    "verb": ["run v 1 1 @ 1 1 00000030", "dog v 1 1 @ 1 1 00000031", "bake v 1 0 1 0 00000032"],
    "adj": ["small a 1 0 1 1 00000040"],
    "adv": ["fast r 1 0 1 1 00000050"],
}
EXCEPTIONS = {"noun": ["axes ax axis", "oxen ox", "ghosts ghost"], "verb": ["ran run"], "adj": [], "adv": []}
LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by\n"
FIRST_SENSES = {
    "dog": 2084071,
    "Dogs": 2084071,
    "axes": 20,
    "boxes": 21,
    "oxen": 22,
    "churches": 23,
    "firemen": 24,
    "ice_cream": 25,
    "ran": 30,
    "running": None,  # no rule takes off a doubled letter
    "baking": 32,
    "baked": 32,
    "smaller": 40,
    "smallest": 40,
    "fast": 50,
    "fastest": None,
    "dog,": None,
    "ghosts": None,  # an exception whose base is not there is not taken apart by rules
    "boxess": 21,  # rules once more
    "ss": 26,
    "": None,
}


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    folder = tmp_path / "dict"
    folder.mkdir()
    for part, lines in INDEX.items():
        (folder / f"index.{part}").write_text(LICENCE + "".join(f"{line}  \n" for line in lines))
        (folder / f"{part}.exc").write_text("".join(f"{line}\n" for line in EXCEPTIONS[part]))
    return folder


def test_first_senses_of_words_and_their_forms(wordnet: Path) -> None:
    found = WordNet(wordnet)
    assert {word: found.first_sense(word) for word in FIRST_SENSES} == FIRST_SENSES
    # Rules that could be applied for ever end, and soon.
    assert found.first_sense("ses" * (LONGEST_WORD // 3)) == 26
    assert found.first_sense("s" * 10_000_000) is None


def test_debians_wordnet() -> None:
    folder = Path("/usr/share/wordnet")
    if not (folder / "index.noun").is_file():
        pytest.skip("needs Debian's wordnet-base")
    each = TextFilter(folder)
    captions = ["a goldfish", "Goldfishes!", "goldfishes swim", "it was the of", "IMG_0001.JPG", "geese", "tested by"]
    # "tested" is an adjective whose number is that of a noun on the list; nltk's `offset()` tells no difference.
    assert EntityFinder(each)(captions).tolist() == [True, False, True, False, False, True, True]


def test_captions_by_wordnet(wordnet: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("n02084071\nn00000023 church\n\n")
    captions = ["two Dogs run", "dog, run", "churches\tof Rome", "an ice_cream", "", None]
    found = [row_of(number, text=text) for number, text in enumerate(captions)]
    pool = write_pool(tmp_path / "pool", [found])
    select(pool, tmp_path / "out.npy", TextFilter(wordnet, tmp_path / "ids.txt"))
    assert uids(tmp_path / "out.npy") == expected([found[0], found[2]], lambda row: True)


def test_captions_by_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entities_module, "_WORDS_REMEMBERED", 2)  # forgets, and asks again
    (tmp_path / "names.txt").write_text("Goldfish\nice cream\nbus\n")
    ask = EntityFinder(TextFilter(names=tmp_path / "names.txt"))
    captions = ["my goldfish", "GOLDFISHES", "two buses here", "some ice cream", "gold fish", "a bus a bus", None, ""]
    assert ask(captions).tolist() == [True, True, True, False, False, True, False, False]
    packaged = EntityFinder(TextFilter(names="imagenet21k"))
    assert packaged(["a goldfish", "some tabbies", "of the to", "xyzzy"]).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --wordnet with the folder"),
        ({"names": "imagenet21k", "synsets": "ids.txt"}, "--synsets: ids are looked up in WordNet"),
        ({"names": "nothing.txt"}, r"--names .*nothing.txt: there is no such file"),
        ({"names": "two.txt"}, "no name of one word"),
        ({"names": "binary.txt"}, "cannot be read"),
        ({"wordnet": "pool"}, "has no index.noun"),
        ({"wordnet": "dict", "synsets": "two.txt"}, "'ice cream' is no id of a synset"),
        ({"wordnet": "broken"}, "'dog n 2' is no entry of an index"),
    ],
)
def test_bad_files_are_told(wordnet: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    write_pool(tmp_path / "pool", [[row_of(0)]])
    (tmp_path / "two.txt").write_text("ice cream\n")
    (tmp_path / "ids.txt").write_text("n02084071\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in wordnet.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "index.noun").write_text("dog n 2\n")
    given = {key: value if value == "imagenet21k" else tmp_path / value for key, value in options.items()}
    with pytest.raises(SubsetError, match=message):
        select(tmp_path / "pool", tmp_path / "out.npy", TextFilter(**given))


def test_languages_by_the_real_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("fasttext") is None:
        pytest.skip("needs the extra `language`")
    found = [row_of(number, text=text) for number, (text, _) in enumerate(SENTENCES)]
    pool = write_pool(tmp_path / "pool", [found])
    made = select(pool, tmp_path / "out.npy", EnglishFilter())
    assert uids(tmp_path / "out.npy") == expected(found[:5], lambda row: True)
    # The file decides, not where it lies.
    (tmp_path / "lid.ftz").write_bytes(language_module.model_path(None).read_bytes())
    same = select(pool, tmp_path / "same.npy", EnglishFilter(tmp_path / "lid.ftz"))
    assert same.digest == made.digest
    select(pool, tmp_path / "german.npy", EnglishFilter(language="de"))
    assert uids(tmp_path / "german.npy") == [found[5]["uid"]]
    (tmp_path / "bad.ftz").write_bytes(b"no model at all")
    with pytest.raises(SubsetError, match=r"--language-model .*bad.ftz: .*Give fasttext's"):
        select(pool, tmp_path / "bad.npy", EnglishFilter(tmp_path / "bad.ftz"))


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pool(tmp_path / "pool", [[row_of(0)]])
    monkeypatch.setattr(language_module, "find_spec", lambda name: None)
    with pytest.raises(SubsetError, match=r"pip install 'neuclip-scale\[language\]'.*--language-column"):
        select(tmp_path / "pool", tmp_path / "out.npy", EnglishFilter())
    with pytest.raises(UsageError, match="give one of them"):
        select(tmp_path / "pool", tmp_path / "out.npy", EnglishFilter(Path(__file__), "lang"))
