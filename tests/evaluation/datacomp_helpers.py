"""Folders of DataComp's tasks, small, with pictures of noise."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluation_helpers import write_set
from PIL import Image

CLASSES = ("cat", "dog", "house", "tree", "car", "red ball", "cloud")
TEMPLATES = "a photo of a {c}.\nthe {c}\n{c}\n"


def noise(seed: int) -> bytes:
    """A picture with colours and edges of its own."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def npy(numbers: Sequence[int]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(numbers, dtype=np.int64))
    return stream.getvalue()


def write_classification(
    folder: Path, sizes: Sequence[int], metadata: int = 0, seed: int = 0, classes: Sequence[str] = CLASSES
) -> Path:
    """A set of shards with the given numbers of pictures; `metadata` columns of group numbers in each .npy."""
    random = np.random.default_rng(seed)
    shards = []
    for size in sizes:
        samples: list[dict[str, object]] = []
        for _ in range(size):
            sample: dict[str, object] = {
                "png": noise(int(random.integers(1 << 30))),
                "cls": str(random.integers(len(classes))),
            }
            if metadata:
                sample["npy"] = npy([int(random.choice([0, 1, 5])) for _ in range(metadata)])
            samples.append(sample)
        shards.append(samples)
    return write_set(folder, shards, classnames="\n".join(classes), zeroshot_classification_templates=TEMPLATES)


def write_pairs(folder: Path, size: int, seed: int = 0) -> Path:
    """A retrieval set as clip_benchmark has it, with one to three captions a picture."""
    samples = [
        {"png": noise(seed + i), "txt": "\n".join(f"caption {k} of picture {i}" for k in range(1 + i % 3))}
        for i in range(size)
    ]
    return write_set(folder, [samples[: size // 2], samples[size // 2 :]], dataset_type="retrieval")


def write_zip(path: Path, pictures: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in pictures.items():
            archive.writestr(f"{path.stem}/{name}", data)


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_captions_table(folder: Path, size: int, seed: int = 0) -> Path:
    """A retrieval set as it lies on the hub: a CSV and a zip."""
    write_zip(folder / "images_test.zip", {f"{i}.png": noise(seed + i) for i in range(size)})
    rows = [
        {"filename": f"{i}.png", "raw": json.dumps([f"caption {k} of picture {i}" for k in range(1 + i % 3)])}
        for i in range(size)
    ]
    write_csv(folder / "test.csv", rows)
    return folder


def write_winogavil(folder: Path, size: int, seed: int = 0) -> Path:
    """Instances of 5, 6, 10 and 12 candidates."""
    random = np.random.default_rng(seed)
    names = [f"thing{i}" for i in range(20)]
    write_zip(folder / "winogavil_images.zip", {f"{name}.png": noise(seed + i) for i, name in enumerate(names)})
    rows = []
    for i in range(size):
        candidates = random.choice(names, (5, 6, 10, 12)[i % 4], replace=False).tolist()
        rows.append(
            {
                "cue": ("apple", "Storm", "idea")[i % 3] + str(i),
                "candidates": str(candidates),
                "associations": str(candidates[: 2 + i % 3]),
            }
        )
    write_csv(folder / "test.csv", rows)
    return folder


def write_suite(data: Path) -> Path:
    """Ten of the tasks, one of each kind of metric."""
    write_classification(data / "wds_cifar10_test", [5, 4], seed=1)
    write_classification(data / "wds_vtab-pets_test", [7], seed=2)
    write_classification(data / "wds_wilds-iwildcam_test", [6, 1, 6], metadata=9, seed=3)
    write_classification(data / "wds_wilds-fmow_test", [8, 5], metadata=3, seed=4)
    write_classification(data / "wds_wilds-camelyon17_test", [9], metadata=3, seed=5, classes=CLASSES[:2])
    write_classification(data / "wds_dollar_street_test", [11], metadata=3, seed=6)
    write_classification(data / "wds_geode_test", [10], metadata=2, seed=7)
    write_pairs(data / "wds_retrieval-flickr_1k_test_image_text_retrieval_test", 9, seed=100)
    write_captions_table(data / "wds_retrieval-mscoco_2014_5k_test_image_text_retrieval_test", 8, seed=200)
    write_winogavil(data / "wds_misc-winogavil_test", 9, seed=300)
    return data


SUITE_KEYS = (
    *("cifar10", "vtab/pets", "retrieval/flickr_1k_test_image_text_retrieval"),
    *("retrieval/mscoco_2014_5k_test_image_text_retrieval", "misc/winogavil", "wilds/iwildcam", "wilds/camelyon17"),
    *("wilds/fmow", "fairness/dollar_street", "fairness/geode"),
)
