"""An evaluation divided among real gloo ranks: the results of one process, and errors on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datacomp_helpers import write_classification, write_pairs, write_suite
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.config import ModelConfig, Recipe, load_recipe
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.data.transforms import EvalTransform
from neuclip_scale.evaluation.datacomp.suite import SuiteRequest, run_suite
from neuclip_scale.evaluation.datacomp.tasks import select_tasks
from neuclip_scale.evaluation.datasets import EvaluationDataError
from neuclip_scale.evaluation.encoders import Encoders
from neuclip_scale.evaluation.sharing import gather_shares, my_share
from neuclip_scale.evaluation.suite import evaluate_folder
from neuclip_scale.models.batch_norm import share_running_statistics
from neuclip_scale.models.building import build_model, create_model
from neuclip_scale.models.presets import get_preset
from neuclip_scale.models.tokenizer import CLIPTokenizer

pytestmark = pytest.mark.distributed


class Counted(CLIPTokenizer):
    """Counts what it is given: who encodes which texts."""

    num_texts = 0

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        self.num_texts += len(texts)
        return super().__call__(texts, context_length)


def encoders() -> Encoders:
    torch.manual_seed(0)
    model = build_model(Recipe(model=ModelConfig(preset="toy"))).eval()
    transform = EvalTransform(model.image_size, model.image_mean, model.image_std)
    return Encoders(model, Counted(model.context_length), transform, torch.device("cpu"), 4, my_share())


def suite(data: Path, output: Path) -> tuple[dict[str, Any], int, list[str]]:
    chosen, lines = encoders(), []
    summary = run_suite(chosen, SuiteRequest(data, output, select_tasks([])), lines.append)
    return summary, chosen.tokenizer.num_texts, lines


def folder_scores(data: Path) -> dict[str, Any]:
    chosen = encoders()
    return evaluate_folder(
        chosen.model, data, chosen.tokenizer, chosen.transform, chosen.device, chosen.batch_size, chosen.share
    )


def test_two_ranks_give_the_results_of_one(tmp_path: Path) -> None:
    data = write_suite(tmp_path / "data")
    (data / "wds_mnist_test").mkdir()  # a set that cannot be used, on every rank
    (alone, all_texts, _), *_ = run_ranks(1, suite, data, tmp_path / "one")
    pair = run_ranks(2, suite, data, tmp_path / "two")
    assert pair[0][0] == pair[1][0] == alone
    assert [failed["key"] for failed in alone["failed"]] == ["mnist"]
    # Bit for bit: the batches hold the same samples, whoever encodes them.
    assert (tmp_path / "one/eval_results.jsonl").read_bytes() == (tmp_path / "two/eval_results.jsonl").read_bytes()
    texts = [num_texts for _, num_texts, _ in pair]
    assert sum(texts) == all_texts  # each text by one rank only
    assert min(texts) > 0.3 * all_texts
    assert len(pair[0][2]) == 11
    assert pair[1][2] == []  # rank 0 alone reports


def test_more_ranks_than_batches(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_classification(data / "z", [3, 2])
    write_pairs(data / "r", 6)
    (alone,) = run_ranks(1, folder_scores, data)
    assert run_ranks(3, folder_scores, data) == [alone] * 3
    assert alone["z"]["num_pictures"] == 5


def fails_on_rank_1() -> str:
    share = my_share()

    def work() -> int:
        if share.rank == 1:
            raise EvaluationDataError("0.tar: fetch it again.")
        return share.rank

    try:
        gather_shares(share, work)
    except EvaluationDataError as error:
        return str(error)
    return "no error"


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    assert run_ranks(2, fails_on_rank_1) == ["0.tar: fetch it again."] * 2


def test_results_can_be_taken_over_by_another_number_of_ranks(tmp_path: Path) -> None:
    write_classification(tmp_path / "data/mnist", [6])
    run_ranks(2, suite, tmp_path / "data", tmp_path / "out")
    path = tmp_path / "out/tasks/wds_mnist_test.json"
    first = path.stat().st_mtime_ns
    ((summary, num_texts, _),) = run_ranks(1, suite, tmp_path / "data", tmp_path / "out")
    assert (path.stat().st_mtime_ns, num_texts) == (first, 0)
    assert summary["tasks"][0]["value"] == json.loads(path.read_text())["metrics"]["acc1"]


def train_with_evaluations(folder: Path, run: str, engine: str, resume: str = "auto") -> dict[str, Any]:
    from neuclip_scale.trainer import Trainer

    values = {
        "run_dir": str(folder / run),
        "data.train": str(folder / "shards"),
        "model.preset": "toy",
        "data.num_workers": 0,
        "data.num_streams": 4,
        "objective.name": "openclip",
        "evaluation.data": str(folder / "eval"),
        "evaluation.normalizer_every_steps": 0,
        "evaluation.at_samples": [9, 32],
        "train.global_batch_size": 8,
        "train.num_steps": 5,
        "checkpoint.every_steps": 2,
        "checkpoint.keep": 3,
        "resume": resume,
        "engine.device": "cpu",
        "engine.name": engine,
        "optim.eps": 1e-3,
    }
    return Trainer(load_recipe("demo", values)).fit()["evaluation"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_evaluates_at_chosen_samples_on_all_ranks(tmp_path: Path, engine: str) -> None:
    write_synthetic_shards(tmp_path / "shards", num_samples=40, samples_per_shard=14, image_size=40, seed=1)
    write_classification(tmp_path / "eval/z", [5, 4])
    write_pairs(tmp_path / "eval/r", 7)
    pair = run_ranks(2, train_with_evaluations, tmp_path, "two", engine)
    assert pair[0] == pair[1]
    lines = [json.loads(line) for line in (tmp_path / "two/evaluations.jsonl").read_text().splitlines()]
    # After the steps that reach 9 and 32 samples, and at the end.
    assert [(line["step"], line["samples_seen"]) for line in lines] == [(2, 16), (4, 32), (5, 40)]
    assert lines[-1]["evaluation"] == pair[0]
    assert all(set(line["evaluation"]) == {"z", "r"} for line in lines)
    assert lines[0]["evaluation"]["z"]["num_pictures"] == 9
    if engine == "fsdp2":
        return
    # A run that has ended evaluates again and writes no second line.
    run_ranks(2, train_with_evaluations, tmp_path, "two", engine)
    assert len((tmp_path / "two/evaluations.jsonl").read_text().splitlines()) == 3
    # A run that goes on from a step whose evaluation is not recorded does it first.
    checkpoint = tmp_path / "two/checkpoints/step_000000002"
    run_ranks(1, train_with_evaluations, tmp_path, "one", engine, str(checkpoint))
    again = [json.loads(line) for line in (tmp_path / "one/evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in again] == [2, 4, 5]
    assert again[0] == lines[0]


def _statistics(shared: bool) -> list[torch.Tensor]:
    """A rank's running means after batches of its own, as the ranks evaluate."""
    torch.manual_seed(distributed.rank())
    model = create_model(get_preset("RN50"), image_size=32).train()
    model(torch.randn(2, 3, 32, 32))
    if shared:
        share_running_statistics(model)
    return [layer.running_mean for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]


def test_ranks_evaluate_with_the_running_statistics_that_are_saved() -> None:
    apart, other = run_ranks(2, _statistics, False)
    assert not all(torch.equal(one, two) for one, two in zip(apart, other, strict=True))
    for ranks in zip(apart, *run_ranks(2, _statistics, True), strict=True):
        assert all(torch.equal(ranks[0], each) for each in ranks[1:])
