"""`neuclip evaluate` on a real model file, and the figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_helpers import COLOURS, jpeg, write_set
from PIL import Image
from trainer_helpers import neuclip_ranks

from neuclip_scale.commands.evaluate import main
from neuclip_scale.commands.scores import print_scores
from neuclip_scale.evaluation.figures import loss_curve, normalizer_error_curve, read_metrics, retrieval_page
from neuclip_scale.evaluation.zero_shot import classification_scores


@pytest.fixture
def data(tmp_path: Path) -> Path:
    names = list(COLOURS)
    pairs = [{"png": jpeg(COLOURS[name]), "txt": name} for name in names]
    write_set(tmp_path / "data/eval/retrieval", [pairs], dataset_type="retrieval")
    pictures = [{"png": jpeg(COLOURS[name]), "cls": str(i)} for i, name in enumerate(names)]
    write_set(tmp_path / "data/eval/zeroshot", [[*pictures, {"png": b"x", "cls": "0"}]], classnames="\n".join(names))
    (tmp_path / "data/demo.json").write_text(json.dumps({"caveat": "This is clip art."}))
    return tmp_path / "data/eval"


def test_scores_chance_caveat_and_files(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(weights), "--preset", "demo", "--data", str(data), "--device", "cpu"]
    assert main([*arguments, "--json", str(tmp_path / "r.json"), "--figures", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr().out
    for text in ("chance", "majority", "25.00 %", "1 sample(s) could not be used", "This is clip art."):
        assert text in printed
    result = json.loads((tmp_path / "r.json").read_text())["evaluation"]
    assert result["zeroshot"]["num_unreadable"] == 1
    assert Image.open(tmp_path / "figures" / "retrieval.png").size[0] > 1000


def test_two_ranks_divide_the_pictures_and_one_reports(data: Path, weights: Path, tmp_path: Path) -> None:
    command = [str(weights), "--preset", "demo", "--data", str(data), "--device", "cpu", "--batch-size", "2", "--json"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    more = [str(tmp_path / "two.json"), "--figures", str(tmp_path / "figures")]
    assert neuclip_ranks(2, ["evaluate", *command, *more], tmp_path / "log") == [0, 0]
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert "text→image R@1" in (tmp_path / "log.0").read_text("utf-8")
    assert "R@1" not in (tmp_path / "log.1").read_text("utf-8")
    assert (tmp_path / "figures" / "retrieval.png").is_file()
    assert neuclip_ranks(2, ["evaluate", *command, *more, "--device", "cpu:1"], tmp_path / "log") == [2, 2]
    assert "every rank has a GPU of its own" in (tmp_path / "log.1").read_text("utf-8")


def test_bad_usage_and_failures(data: Path, weights: Path, tmp_path: Path) -> None:
    assert main([str(tmp_path / "absent"), "--data", str(data)]) == 2
    assert main([str(weights), "--data", str(tmp_path / "absent")]) == 2
    assert main([str(weights), "--preset", "no-such", "--data", str(data)]) == 2
    assert main([str(weights), "--preset", "demo", "--data", str(data), "--device", "abacus"]) == 2
    assert main([str(weights), "--preset", "demo", "--data", str(data), "--device", "cuda:99"]) == 2
    assert main([str(weights), "--preset", "demo", "--data", str(data), "--device", "meta"]) == 2
    assert main([str(weights), "--preset", "demo", "--data", str(data), "--device", "hpu"]) == 2
    assert main([str(weights), "--preset", "demo", "--weights", "ema", "--data", str(data)]) == 2
    assert main([str(weights), "--preset", "ViT-B-32", "--data", str(data)]) == 1
    (tmp_path / "empty").mkdir()
    assert main([str(weights), "--preset", "demo", "--data", str(tmp_path / "empty")]) == 1
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main([str(tmp_path / "run"), "--data", str(data)]) == 1
    assert main([str(tmp_path / "run"), "--preset", "demo", "--data", str(data)]) == 2


def test_curves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "samples_seen": 8 * s, "loss": 3 / s} for s in range(1, 30)]
    lines[4] |= {"normalizer/mse": 0.3, "normalizer/bias": -0.1, "normalizer/mse_batch": 1.0}
    lines[9] |= {"normalizer/mse": "NaN", "normalizer/bias": 0.1}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')
    assert len(read_metrics(path)) == 29
    loss_curve({"one": path, "two": path}, tmp_path / "loss.png")
    normalizer_error_curve({"one": path}, tmp_path / "normalizer.png")
    for name in ("loss.png", "normalizer.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="no line has a loss"):
        loss_curve({"one": path}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="normalizer_every_steps"):
        normalizer_error_curve({"one": path}, tmp_path / "x.png")
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_names_and_caveats_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = torch.zeros(3, dtype=torch.int64)
    scores = classification_scores(ranks, ranks, 2) | {"task": "zeroshot", "num_unreadable": 1, "unreadable": ["[b]"]}
    print_scores({"[red] :cat:": scores}, "clip art [/x]")
    printed = capsys.readouterr().out
    for text in ("[red] :cat: top-1", "[red] :cat:: 3 pictures", "[b]", "clip art [/x]"):
        assert text in printed


def test_dollars_are_no_formulas(tmp_path: Path) -> None:
    features, pictures = torch.eye(2), [Image.new("RGB", (8, 8))] * 2
    page = tmp_path / "page.png"
    retrieval_page(features, features, pictures, ["from $5^^ to $9", r"a $\frac$"], page, title="sets of $^$")
    assert page.is_file()
    metrics = tmp_path / "metrics.jsonl"
    line = {"step": 1, "loss": 1, "normalizer/mse": 1, "normalizer/mse_batch": 1, "normalizer/bias": 1}
    metrics.write_text(json.dumps(line))
    for draw in (loss_curve, normalizer_error_curve):
        draw({"$^$": metrics}, tmp_path / f"{draw.__name__}.png")


def test_right_answers_are_green(tmp_path: Path) -> None:
    features = F.normalize(torch.eye(6), dim=-1)
    pictures = [Image.new("RGB", (8, 8), (200, 200, 200))] * 6
    captions = [f"name {i}" for i in range(6)]
    for text, greenish in ((features, True), (features.roll(1, 0) - features, False)):
        retrieval_page(features, F.normalize(text, dim=-1), pictures, captions, tmp_path / "page.png", num_queries=3)
        array = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
        green = ((array[..., 1] - array[..., 0] > 60) & (array[..., 1] - array[..., 2] > 40)).sum()
        assert (green > 500) == greenish
