"""The suite on small folders against scores of one picture at a time; what is taken over; hostile folders."""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datacomp_helpers import (
    CLASSES,
    SUITE_KEYS,
    TEMPLATES,
    noise,
    npy,
    write_captions_table,
    write_classification,
    write_csv,
    write_pairs,
    write_suite,
    write_winogavil,
    write_zip,
)
from evaluation_helpers import write_set
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as sk

from neuclip_scale.config import ModelConfig, Recipe
from neuclip_scale.data.shards import index_shard
from neuclip_scale.data.transforms import EvalTransform
from neuclip_scale.evaluation.datacomp.answering import evaluate_task
from neuclip_scale.evaluation.datacomp.archive import Archive
from neuclip_scale.evaluation.datacomp.fingerprints import model_digest
from neuclip_scale.evaluation.datacomp.suite import SuiteRequest, run_suite
from neuclip_scale.evaluation.datacomp.tasks import select_tasks
from neuclip_scale.evaluation.datasets import EvaluationDataError, _groups
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.models.building import build_model, create_model
from neuclip_scale.models.presets import get_preset
from neuclip_scale.models.tokenizer import CLIPTokenizer


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    torch.manual_seed(0)
    model = build_model(Recipe(model=ModelConfig(preset="toy"))).eval()
    transform = EvalTransform(model.image_size, model.image_mean, model.image_std)
    return Encoders(model, CLIPTokenizer(model.context_length), transform, torch.device("cpu"), batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


def run(encoders: Encoders, data: Path, output: Path, names: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    request = SuiteRequest(data, output, select_tasks(names), **options)
    return run_suite(encoders, request, report=lambda line: None)


def results(output: Path) -> dict[str, dict[str, Any]]:
    lines = (output / "eval_results.jsonl").read_text().splitlines()
    return {line["key"]: line for line in map(json.loads, lines)}


@torch.no_grad()
def image_row(encoders: Encoders, data: bytes) -> np.ndarray:
    """One picture alone, through Pillow."""
    image = encoders.transform(Image.open(io.BytesIO(data)).convert("RGB"))
    return F.normalize(encoders.model(images=image[None]).image_features[0].double(), dim=0).numpy()


@torch.no_grad()
def text_row(encoders: Encoders, text: str) -> np.ndarray:
    tokens = encoders.tokenizer([text])
    return F.normalize(encoders.model(tokens=tokens).text_features[0].double(), dim=0).numpy()


def members(folder: Path) -> list[dict[str, bytes]]:
    """Samples of a set, read with the standard library."""
    samples: dict[tuple[int, str], dict[str, bytes]] = {}
    for number in range(int((folder / "test/nshards.txt").read_text())):
        with tarfile.open(folder / "test" / f"{number}.tar") as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                samples.setdefault((number, key), {})[extension] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return list(samples.values())


def one_by_one(encoders: Encoders, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [N, C], labels and metadata."""
    prompts = [[line.replace("{c}", name) for line in TEMPLATES.split("\n") if line] for name in CLASSES]
    means = np.stack([np.mean([text_row(encoders, text) for text in texts], axis=0) for texts in prompts])
    classifier = means / np.linalg.norm(means, axis=1, keepdims=True)
    samples = members(folder)
    scores = np.stack([image_row(encoders, sample["png"]) for sample in samples]) @ classifier.T
    metadata = np.stack([np.load(io.BytesIO(sample["npy"])) for sample in samples])
    return scores, np.array([int(sample["cls"]) for sample in samples]), metadata


def test_every_kind_against_scores_of_one_picture_at_a_time(encoders: Encoders, data: Path, tmp_path: Path) -> None:
    summary = run(encoders, data, tmp_path)
    found = results(tmp_path)
    assert tuple(found) == SUITE_KEYS
    assert found["cifar10"]["dataset"] == "CIFAR-10"
    assert len(summary["missing"]) == 28
    assert summary["failed"] == []

    scores, labels, metadata = one_by_one(encoders, data / "wds_wilds-fmow_test")
    right = scores.argmax(1) == labels
    regions = {r: right[metadata[:, 0] == r].mean() for r in np.unique(metadata[:, 0])}
    fmow = found["wilds/fmow"]["metrics"]
    assert fmow["acc1"] == pytest.approx(right.mean())
    assert fmow["main_metric"] == fmow["acc_worst_region"] == pytest.approx(min(regions.values()))
    assert fmow["acc_region:5"] == pytest.approx(regions[5])
    assert fmow["acc_worst_region_without_other"] == pytest.approx(min(regions[0], regions[1]))

    scores, labels, _ = one_by_one(encoders, data / "wds_wilds-iwildcam_test")
    expected = sk.f1_score(labels, scores.argmax(1), average="macro", labels=np.unique(labels), zero_division=0)
    assert found["wilds/iwildcam"]["metrics"]["main_metric"] == pytest.approx(expected)

    scores, labels, metadata = one_by_one(encoders, data / "wds_dollar_street_test")
    top = (np.argsort(-scores, axis=1)[:, :5] == labels[:, None]).any(1)
    worst = min(top[metadata[:, 0] == group].mean() for group in np.unique(metadata[:, 0]))
    street = found["fairness/dollar_street"]["metrics"]
    assert street["main_metric"] == street["acc_top5_wg"] == pytest.approx(worst)
    assert street["acc5"] == pytest.approx(top.mean())
    assert found["wilds/camelyon17"]["metrics"]["acc5"] is None


def test_retrieval_from_shards_and_from_a_table_are_one(encoders: Encoders, tmp_path: Path) -> None:
    flickr, coco = select_tasks(["Flickr", "MSCOCO"])
    shards = evaluate_task(flickr, write_pairs(tmp_path / "a", 9), encoders)
    table = evaluate_task(coco, write_captions_table(tmp_path / "b", 9), encoders)
    assert shards.metrics == table.metrics
    images = np.stack([image_row(encoders, noise(i)) for i in range(9)])
    captions = [(i, f"caption {k} of picture {i}") for i in range(9) for k in range(1 + i % 3)]
    similarities = images @ np.stack([text_row(encoders, text) for _, text in captions]).T  # [9, T]
    owner = np.array([i for i, _ in captions])
    to_text = np.mean([owner[row.argmax()] == i for i, row in enumerate(similarities)])
    to_image = np.mean([column.argmax() == own for column, own in zip(similarities.T, owner)])
    assert shards.metrics["text_retrieval_recall@1"] == pytest.approx(to_text)
    assert shards.metrics["image_retrieval_recall@1"] == pytest.approx(to_image)
    assert shards.metrics["mean_recall@1"] == pytest.approx((to_text + to_image) / 2)
    assert shards.num_samples == 9


def test_winogavil_against_scikit_learn(encoders: Encoders, tmp_path: Path) -> None:
    folder = write_winogavil(tmp_path / "w", 8)
    (task,) = select_tasks(["WinoGAViL"])
    outcome = evaluate_task(task, folder, encoders)
    with zipfile.ZipFile(folder / "winogavil_images.zip") as archive:
        pictures = {Path(name).stem: image_row(encoders, archive.read(name)) for name in archive.namelist()}
    by_size: dict[int, list[float]] = {}
    for row in csv.DictReader((folder / "test.csv").read_text().splitlines()):
        candidates, cue = ast.literal_eval(row["candidates"]), row["cue"].lower()
        text = text_row(encoders, f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}")
        wanted = np.isin(candidates, ast.literal_eval(row["associations"]))
        chosen = np.argsort([pictures[name] @ text for name in candidates])[-wanted.sum() :]
        score = sk.jaccard_score(wanted, np.isin(np.arange(len(candidates)), chosen))
        by_size.setdefault(len(candidates), []).append(score)
    assert outcome.metrics["jaccard_score_10-12"] == pytest.approx(np.mean(by_size[10] + by_size[12]))
    assert outcome.metrics["jaccard_score_5"] == pytest.approx(np.mean(by_size[5]))
    assert outcome.num_samples == 8


def test_what_is_done_is_taken_over_until_model_or_data_change(
    encoders: Encoders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classification(tmp_path / "in/cifar10", [3])
    write_classification(tmp_path / "in/mnist", [4], seed=9)
    output = tmp_path / "out"
    done: list[str] = []

    def told(line: str) -> None:
        done.append(line)

    def again(chosen: Encoders, names: Sequence[str] = ("cifar10", "mnist")) -> list[str]:
        before = {path: path.stat().st_mtime_ns for path in (output / "tasks").glob("*.json")}
        run_suite(chosen, SuiteRequest(tmp_path / "in", output, select_tasks(names)), told)
        return sorted(p.stem for p in (output / "tasks").glob("*.json") if before.get(p) != p.stat().st_mtime_ns)

    assert again(encoders, ["cifar10"]) == ["wds_cifar10_test"]
    assert again(encoders) == ["wds_mnist_test"]
    assert again(encoders) == []
    assert list(results(output)) == ["cifar10", "mnist"]
    assert again(dataclasses.replace(encoders, batch_size=3)) == []
    # One task asked for: the other's result stays in the file.
    assert again(encoders, ["mnist"]) == []
    assert list(results(output)) == ["cifar10", "mnist"]

    (tmp_path / "in/mnist/classnames.txt").write_text("\n".join(reversed(CLASSES)))
    assert again(encoders) == ["wds_mnist_test"]
    (output / "tasks" / "wds_mnist_test.json").write_text('{"key": "mnist", "metr')
    assert again(encoders) == ["wds_mnist_test"]
    other = build_model(Recipe(model=ModelConfig(preset="toy"))).eval()
    assert again(dataclasses.replace(encoders, model=other)) == ["wds_cifar10_test", "wds_mnist_test"]
    # A result of other data or of another model is in no file.
    (tmp_path / "in/mnist/test/0.tar").write_bytes(b"")
    assert again(dataclasses.replace(encoders, model=other)) == []
    assert list(results(output)) == ["cifar10"]
    assert "mnist" in [task["key"] for task in json.loads((output / "summary.json").read_text())["failed"]]


def test_a_set_of_another_size_is_in_no_average(encoders: Encoders, tmp_path: Path) -> None:
    write_classification(tmp_path / "in/imagenet1k", [6])
    summary = run(encoders, tmp_path / "in", tmp_path / "out", ["imagenet"])
    assert summary["averages"]["ImageNet"]["value"] is None
    assert summary["incomplete"] == [
        {"key": "imagenet1k", "reason": "6 samples, where DataComp has 50,000", "unreadable": []}
    ]
    summary = run(encoders, tmp_path / "in", tmp_path / "out", ["imagenet"], any_size=True)
    score = results(tmp_path / "out")["imagenet1k"]["metrics"]["acc1"]
    assert summary["averages"]["ImageNet"]["value"] == score
    assert summary["averages"]["Average"]["value"] is None
    assert summary["averages"]["Average"]["mean_of_those_present"] == score


def missing_classes(folder: Path) -> None:
    write_classification(folder, [3])
    (folder / "classnames.txt").unlink()


def cut_tar(folder: Path) -> None:
    write_classification(folder, [3, 3])
    shard = folder / "test/1.tar"
    shard.write_bytes(shard.read_bytes()[: index_shard(shard).members(2)["png"].offset + 9])


def label_out_of_range(folder: Path) -> None:
    write_set(folder, [[{"png": noise(1), "cls": "7"}]], classnames="\n".join(CLASSES))


def absent_shard(folder: Path) -> None:
    write_classification(folder, [3])
    (folder / "test/nshards.txt").write_text("2")


def shards_without_number(folder: Path) -> None:
    write_classification(folder, [3])
    (folder / "test/nshards.txt").write_text("999999")


def names_in_latin_1(folder: Path) -> None:
    write_classification(folder, [3])
    (folder / "classnames.txt").write_bytes("caf\u00e9\ntea".encode("latin-1"))


def templates_in_latin_1(folder: Path) -> None:
    write_classification(folder, [3])
    (folder / "zeroshot_classification_templates.txt").write_bytes("un caf\u00e9, {c}".encode("latin-1"))


def no_template(folder: Path) -> None:
    write_classification(folder, [3])
    (folder / "zeroshot_classification_templates.txt").write_text("a photo\n")


def pairs_instead(folder: Path) -> None:
    write_pairs(folder, 4)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (missing_classes, "mnist is no evaluation set: it has neither classnames.txt"),
        (cut_tar, "test/1.tar: cut off at byte .* Fetch this file again"),
        (label_out_of_range, r"0_0000.cls is 7, but classnames.txt has 7 classes"),
        (absent_shard, r"nshards.txt says 2 shard\(s\); missing: .*1\.tar"),
        (shards_without_number, r"nshards.txt says 9{6} shard\(s\); missing: [^,]*1\.tar\.$"),
        (names_in_latin_1, r"classnames.txt is no text in UTF-8 .* fetch it again"),
        (templates_in_latin_1, r"templates.txt is no text in UTF-8 .* fetch it again"),
        (no_template, r"zeroshot_classification_templates.txt: template 'a photo' has no \{c\}"),
        (pairs_instead, "is a set for retrieval, and this task is zeroshot"),
    ],
)
def test_a_hostile_folder_is_an_error_and_the_others_go_on(
    encoders: Encoders, tmp_path: Path, spoil: Callable[[Path], None], text: str
) -> None:
    spoil(tmp_path / "in/mnist")
    write_classification(tmp_path / "in/stl10", [3])
    summary = run(encoders, tmp_path / "in", tmp_path / "out", ["mnist", "stl10"])
    (failed,) = summary["failed"]
    assert failed["key"] == "mnist"
    with pytest.raises(EvaluationDataError, match=text):
        evaluate_task(select_tasks(["mnist"])[0], tmp_path / "in/mnist", encoders)
    assert list(results(tmp_path / "out")) == ["stl10"]


def test_samples_without_groups_are_told(encoders: Encoders, tmp_path: Path) -> None:
    good = {"png": noise(1), "cls": "0", "npy": npy([1, 2])}
    bad = [b"", b"\x93NUMPY", npy([]), npy([-1, 0])]
    samples = [good, {"png": noise(1), "cls": "0"}, *({**good, "npy": data} for data in bad)]
    folder = write_set(tmp_path / "in/geode", [samples], classnames="\n".join(CLASSES))
    outcome = evaluate_task(select_tasks(["GeoDE"])[0], folder, encoders)
    assert (outcome.num_samples, len(outcome.unreadable)) == (1, 5)
    assert outcome.unreadable[0] == "0_0001: no .npy member"


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=60).map(lambda tail: npy([1, 2, 3])[:90] + tail)))
def test_any_bytes_are_groups_or_a_value_error(data: bytes) -> None:
    try:
        numbers = _groups(data, (0, 1))
    except ValueError:
        return
    assert len(numbers) == 2
    assert all(isinstance(number, int) and number >= 0 for number in numbers)


@pytest.mark.parametrize("text", ["-" * 9000 + "1", "1" + "+1" * 4000])
def test_a_header_that_is_nested_for_ever_is_a_value_error(text: str) -> None:
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with pytest.raises(ValueError, match="npy"):
        _groups(data, (0,))


def test_a_header_that_claims_the_world_takes_no_memory() -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)})
    with pytest.raises(ValueError, match="buffer"):
        _groups(stream.getvalue(), (0,))
    assert _groups(stream.getvalue() + np.array([4, 7]).tobytes(), (1,)) == [7]


def zip_with(name: str, method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, noise(1))
    return stream.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_inside_a_zip_is_told_whatever_its_compression(tmp_path: Path, method: int) -> None:
    data = bytearray(zip_with("a.png", method))
    data[80] ^= 0xFF
    (tmp_path / "i.zip").write_bytes(data)
    assert str(Archive(tmp_path).read("a.png")).startswith("unreadable (")


def test_hostile_tables(encoders: Encoders, tmp_path: Path) -> None:
    (wino,), (coco,) = select_tasks(["WinoGAViL"]), select_tasks(["MSCOCO"])
    folder = tmp_path / "w"
    write_zip(folder / "i.zip", {"a.png": noise(1), "b.png": noise(2), "c.png": b"no picture"})
    with pytest.raises(EvaluationDataError, match="needs one CSV file with the columns cue, candidates, associations"):
        evaluate_task(wino, folder, encoders)
    good = {"cue": "x", "candidates": "['a', 'b']", "associations": '["a"]'}
    broken = [
        {**good, "candidates": "__import__('os').system('false')"},
        {**good, "candidates": "[" * 100_000},
        {**good, "associations": "['z']"},
        {**good, "cue": ""},
        {**good, "candidates": "['a', 'c']"},
        {**good, "candidates": "['a', '../../etc/passwd']"},
    ]
    write_csv(folder / "t.csv", [good, *broken])
    outcome = evaluate_task(wino, folder, encoders)
    assert outcome.num_samples == 1
    assert outcome.metrics["jaccard_score_10-12"] is None
    assert [reason.split(":")[0] for reason in outcome.unreadable[:4]] == ["row 2", "row 3", "row 4", "row 5"]
    (folder / "i.zip").write_bytes((folder / "i.zip").read_bytes()[:-30])
    with pytest.raises(EvaluationDataError, match=r"i\.zip is no whole zip file"):
        evaluate_task(wino, folder, encoders)
    (folder / "i.zip").write_bytes(zip_with("caf\u00e9.png").replace("\u00e9".encode(), b"\xe9 "))
    with pytest.raises(EvaluationDataError, match=r"i\.zip is no whole zip file"):
        evaluate_task(wino, folder, encoders)
    table = write_captions_table(tmp_path / "c", 3)
    (table / "images_test.zip").unlink()
    with pytest.raises(EvaluationDataError, match="holds no picture"):
        evaluate_task(coco, table, encoders)


def test_results_of_another_activation_or_number_of_heads_are_not_taken_over() -> None:
    """The same weights and shapes compute something else with them."""
    plain = get_preset("toy")
    variants = [
        plain,
        dataclasses.replace(plain, quick_gelu=True),
        dataclasses.replace(plain, image=dataclasses.replace(plain.image, heads=1)),
    ]
    digests = set()
    for preset in variants:
        torch.manual_seed(0)
        model = create_model(preset)
        transform = EvalTransform(model.image_size, model.image_mean, model.image_std)
        encoders = Encoders(model, CLIPTokenizer(model.context_length), transform, torch.device("cpu"))
        digests.add(model_digest(encoders))
    assert len(digests) == len(variants)
