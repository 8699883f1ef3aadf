"""The table of tasks and the averages, against what DataComp's repository publishes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from neuclip_scale.evaluation.datacomp.averages import average_scores
from neuclip_scale.evaluation.datacomp.results import Result, write_results_file
from neuclip_scale.evaluation.datacomp.tasks import SuiteError, all_tasks, select_tasks

# DataComp's aggregate_scores.py groups by name.
SHIFTS = {"ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet"}
VTAB = {
    *("Caltech-101", "CIFAR-100", "CLEVR Counts", "CLEVR Distance", "Describable Textures", "EuroSAT", "SVHN"),
    *("KITTI Vehicle Distance", "Oxford Flowers-102", "Oxford-IIIT Pet", "PatchCamelyon", "RESISC45", "SUN397"),
}
RETRIEVAL = {"Flickr", "MSCOCO", "WinoGAViL"}


def test_the_table() -> None:
    tasks = all_tasks()
    assert len(tasks) == len({task.key for task in tasks}) == len({task.name for task in tasks}) == 38
    assert {task.name for task in tasks if task.group == "shifts"} == SHIFTS
    assert {task.name for task in tasks if task.group == "vtab"} == VTAB
    assert {task.name for task in tasks if task.group == "retrieval"} == RETRIEVAL
    assert [task.name for task in tasks if task.group == "imagenet"] == ["ImageNet 1k"]
    assert sum(task.size for task in tasks) == 697_369
    assert {task.name: task.metric for task in tasks if task.metric != "acc1"} == {
        **dict.fromkeys(("Caltech-101", "FGVC Aircraft", "Oxford Flowers-102"), "mean_per_class_recall"),
        "Oxford-IIIT Pet": "mean_per_class_recall",
        "Flickr": "mean_recall@1",
        "MSCOCO": "mean_recall@1",
        "WinoGAViL": "jaccard_score_10-12",
        "iWildCam": "F1-macro_all",
        "FMoW": "acc_worst_region",
        "Dollar Street": "acc_top5_wg",
        "GeoDE": "acc_wg",
    }


def test_folders_and_repositories() -> None:
    named = {task.name: (task.folder, task.repository) for task in all_tasks()}
    assert named["Caltech-101"] == ("wds_vtab-caltech101_test", "djghosh/wds_vtab-caltech101_test")
    assert named["GeoDE"] == ("wds_geode_test", "djghosh/wds_geode_test")
    assert named["FMoW"] == ("wds_wilds-fmow_test", "djghosh/wds_wilds-fmow_test")
    assert named["WinoGAViL"] == ("wds_misc-winogavil_test", "nlphuji/winogavil")


@pytest.mark.parametrize("name", ["wds_vtab-dtd_test", "wds_vtab-dtd", "vtab-dtd", "vtab/dtd", "dtd"])
def test_a_folder_is_found_by_the_usual_names(tmp_path: Path, name: str) -> None:
    (task,) = select_tasks(["vtab/dtd"])
    assert task.locate(tmp_path) is None
    (tmp_path / name).mkdir(parents=True)
    assert task.locate(tmp_path) == tmp_path / name


def test_selection_by_key_name_and_group_keeps_the_order() -> None:
    chosen = [task.name for task in select_tasks(["retrieval", "imagenet1k", "MNIST"])]
    assert chosen == ["ImageNet 1k", "MNIST", "Flickr", "MSCOCO", "WinoGAViL"]
    assert len(select_tasks([])) == 38
    with pytest.raises(SuiteError, match="'imagenet2k' is no task"):
        select_tasks(["imagenet2k"])


def published_averages(path: Path) -> dict[str, float]:
    """What DataComp's aggregate_scores.py does with a result file, in pandas as it does."""
    frame = pd.read_json(path, lines=True)
    frame["score"] = [metrics["main_metric"] for metrics in frame["metrics"]]
    frame = frame.dropna(subset=["score"]).set_index("dataset")["score"]
    assert len(frame) == 38
    means = {"ImageNet dist. shifts": SHIFTS, "VTAB": VTAB, "Retrieval": RETRIEVAL}
    return {
        "ImageNet": frame["ImageNet 1k"],
        **{name: frame[sorted(members)].mean() for name, members in means.items()},
        "Average": frame.mean(),
    }


def test_averages_as_datacomp_has_them(tmp_path: Path) -> None:
    scores = {task.key: (7 * i % 38) / 40 for i, task in enumerate(all_tasks())}
    results = [
        (task, Result(task.key, {"acc5": None, task.metric: scores[task.key]}, task.size, 0, [], 1.0, "m", "d"))
        for task in all_tasks()
    ]
    write_results_file(tmp_path, results)
    ours = average_scores(scores)
    published = published_averages(tmp_path / "eval_results.jsonl")
    assert {name: average["value"] for name, average in ours.items()} == pytest.approx(published)
    assert not any(average["missing"] for average in ours.values())
    assert not any(result.fault(task) for task, result in results)


def test_an_average_over_fewer_is_none_and_says_what_is_missing() -> None:
    scores = {task.key: 0.5 for task in all_tasks()}
    del scores["objectnet"]
    scores["imagenetv2"] = 0.9
    averages = average_scores(scores)
    shifts = averages["ImageNet dist. shifts"]
    assert shifts["value"] is None
    assert shifts["mean_of_those_present"] == pytest.approx((4 * 0.5 + 0.9) / 5)
    assert (shifts["num_present"], shifts["num_tasks"], shifts["missing"]) == (5, 6, ["objectnet"])
    assert averages["Average"]["value"] is None
    assert averages["VTAB"]["value"] == pytest.approx(0.5)
    assert average_scores({})["VTAB"]["mean_of_those_present"] is None
