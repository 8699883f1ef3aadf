"""Whole evaluations of sets on disk, with a model whose answers are known, and of damaged sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation_helpers import COLOURS, ColourModel, ColourTokenizer, jpeg, write_set

from neuclip_scale.data.shards import index_shard
from neuclip_scale.data.transforms import EvalTransform
from neuclip_scale.evaluation.datasets import EvaluationDataError, open_set, read_thumbnails
from neuclip_scale.evaluation.prompts import fill, read_templates, zero_shot_classifier
from neuclip_scale.evaluation.suite import evaluate_folder, find_sets

TRANSFORM = EvalTransform(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLASSES = "red\ngreen\nblue\n"
TEMPLATES = {"classnames": CLASSES, "zeroshot_classification_templates": "a {c} thing\nall {c}\n"}


def evaluate(folder: Path, batch_size: int = 3) -> dict[str, dict[str, object]]:
    return evaluate_folder(ColourModel(), folder, ColourTokenizer(), TRANSFORM, "cpu", batch_size)


def picture(name: str, label: int) -> dict[str, object]:
    return {"png": jpeg(COLOURS[name]), "cls": str(label)}


def test_both_tasks_and_shards_in_order(tmp_path: Path) -> None:
    shards = [
        [picture("red", 0), picture("green", 1), picture("blue", 2)],
        [picture("red", 0), picture("red", 1)],
    ]
    write_set(tmp_path / "zeroshot", shards, **TEMPLATES)
    pairs = [{"png": jpeg(COLOURS[name]), "txt": f"{name} thing\nvery {name}\n"} for name in ("red", "green", "blue")]
    write_set(tmp_path / "retrieval", [pairs], dataset_type="retrieval\n")
    result = evaluate(tmp_path)
    assert set(result) == {"zeroshot", "retrieval"}
    zero_shot = result["zeroshot"]
    assert zero_shot["top1"] == pytest.approx(4 / 5)
    assert zero_shot["mean_per_class_recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert (zero_shot["num_pictures"], zero_shot["num_templates"]) == (5, 2)
    assert zero_shot["majority"] == pytest.approx(2 / 5)
    assert result["retrieval"]["image_to_text"]["recall@1"] == 1.0
    assert result["retrieval"]["text_to_image"]["recall@1"] == 1.0
    assert result["retrieval"]["num_texts"] == 6
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_does_not_matter(tmp_path: Path, batch_size: int) -> None:
    samples = [picture(name, i % 3) for i, name in enumerate(["red", "green", "blue", "white", "red"])]
    folder = write_set(tmp_path / "z", [samples], classnames=CLASSES)
    scores = evaluate(folder, batch_size)["z"]
    assert scores == evaluate(folder, 3)["z"]
    assert scores["top1"] == pytest.approx(3 / 5)


def test_a_folder_that_is_itself_a_set(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "colours", [[picture("red", 0)]], classnames=CLASSES)
    assert list(find_sets(folder)) == ["colours"]
    assert evaluate(folder)["colours"]["top1"] == 1.0


def test_shards_that_no_file_says_the_kind_of_are_not_left_out(tmp_path: Path) -> None:
    write_set(tmp_path / "colours", [[picture("red", 0)]], classnames=CLASSES)
    write_set(tmp_path / "pairs", [[{"png": jpeg(COLOURS["red"]), "txt": "red"}]])
    with pytest.raises(EvaluationDataError, match=r"pairs is no evaluation set: it has neither classnames\.txt"):
        evaluate(tmp_path)


def test_unreadable_samples_are_counted_and_listed(tmp_path: Path) -> None:
    samples = [
        picture("red", 0),
        {"png": b"not a picture", "cls": "1"},
        {"cls": "1"},
        {"png": jpeg(COLOURS["green"])},
        {"png": jpeg(COLOURS["green"]), "cls": "one"},
    ]
    scores = evaluate(write_set(tmp_path / "z", [samples], classnames=CLASSES))["z"]
    assert (scores["num_pictures"], scores["num_unreadable"]) == (1, 4)
    assert [reason.split(":")[0] for reason in scores["unreadable"]] == [
        "0_0001",
        "0_0002",
        "0_0003",
        "0_0004",
    ]
    assert scores["unreadable"][2] == "0_0003: no .cls member"


def test_damaged_shard_is_told_and_the_next_is_read(tmp_path: Path) -> None:
    shards = [[picture("red", 0), picture("green", 1)], [picture("blue", 2)]]
    folder = write_set(tmp_path / "z", shards, classnames=CLASSES)
    first = folder / "test" / "0.tar"
    index = index_shard(first)
    cut = index.members(1)["png"].offset + 5
    first.write_bytes(first.read_bytes()[:cut])
    scores = evaluate(folder)["z"]
    assert scores["num_pictures"] == 2
    assert scores["num_unreadable"] == 1
    assert scores["unreadable"][0].startswith("0.tar (shard): cut off")


def test_empty_and_mismatched_sets_are_errors(tmp_path: Path) -> None:
    nothing = write_set(tmp_path / "a", [[{"png": b"x", "cls": "0"}]], classnames=CLASSES)
    with pytest.raises(EvaluationDataError, match="no sample is usable"):
        evaluate(nothing)
    mismatched = write_set(tmp_path / "b", [[picture("red", 3)]], classnames=CLASSES)
    with pytest.raises(EvaluationDataError, match="3 classes"):
        evaluate(mismatched)
    with pytest.raises(EvaluationDataError, match="demo-data"):
        evaluate(tmp_path / "b" / "test")
    (tmp_path / "b" / "test" / "nshards.txt").write_text("2")
    with pytest.raises(EvaluationDataError, match=r"1\.tar"):
        open_set(tmp_path / "b")


def test_templates(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    assert read_templates(path) == ("a photo of a {c}.",)
    path.write_text("{c}\n\n the {c} of {braces}\n")
    assert read_templates(path) == ("{c}", "the {c} of {braces}")
    assert fill("the {c} of {braces}", "{x}") == "the {x} of {braces}"
    path.write_text("no place\n")
    with pytest.raises(EvaluationDataError, match="no place"):
        read_templates(path)


def test_prompt_ensemble_is_the_renormalised_mean_of_unit_rows() -> None:
    templates = ("{c}", "{c} white", "blue {c}")
    got = zero_shot_classifier(ColourModel(), ColourTokenizer(), ["red", "green"], templates, torch.device("cpu"), 4)
    red = torch.tensor([[1.0, 0, 0], [2.0, 1, 1], [1.0, 0, 1]], dtype=torch.float64)
    mean = (red / red.norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(got[0].double(), mean / mean.norm(), atol=1e-6, rtol=0)


def test_the_model_is_left_in_the_mode_it_had(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "z", [[picture("red", 0)]], classnames=CLASSES)
    model = ColourModel().train()
    evaluate_folder(model, folder, ColourTokenizer(), TRANSFORM, "cpu", 4)
    assert model.training


def test_thumbnails_follow_the_usable_samples(tmp_path: Path) -> None:
    samples = [picture("red", 0), {"png": b"x", "cls": "0"}, picture("blue", 2)]
    thumbnails = read_thumbnails(open_set(write_set(tmp_path / "z", [samples], classnames=CLASSES)), size=24)
    assert [image.getpixel((12, 12)) for image in thumbnails] == [COLOURS["red"], COLOURS["blue"]]
    assert thumbnails[0].size == (24, 24)
