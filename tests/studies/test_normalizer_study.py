"""`neuclip study normalizer` on synthetic pairs: rows, resuming, summaries, and the gradient's bias and noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from neuclip_scale import cli
from neuclip_scale.config import ConfigError
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.studies.normalizer.estimators import SWEEPS, estimators
from neuclip_scale.studies.normalizer.gradients import GradientProbe, _Moments
from neuclip_scale.studies.normalizer.summary import findings, late, summarise, summarise_gradients
from neuclip_scale.studies.page import Page, Section


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "shards"
    write_synthetic_shards(folder, num_samples=60, samples_per_shard=20, image_size=40, seed=1)
    demo = (Path(cli.__file__).parent / "recipes" / "demo.yaml").read_text("utf-8")
    folder.with_name("toy.yaml").write_text(demo.replace("preset: demo", "preset: toy"))
    return folder


def arguments(shards: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--steps", "5", "--measure-every", "2", "--prototypes", "24", "--restart-every", "2", "--threads", "1"]
    sizes += ["--recipe", str(shards.with_name("toy.yaml"))]
    return ["study", "normalizer", "--output", str(output), "--data", str(shards), "--batches", "12", *sizes, *more]


def test_a_study_writes_rows_figures_and_a_page_and_goes_on(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    more = ["--seeds", "0", "--sweeps", "queue", "--gradient-batches", "2", "--shards", "2", "0"]
    assert cli.main(arguments(shards, out, *more)) == 0
    text = capsys.readouterr().out
    result = json.loads((out / "result.json").read_bytes())
    labels = list(estimators(("queue",), 24, 2))
    assert {row["estimator"] for row in result["rows"]} == set(labels)
    # Two data sizes, measurements at steps 1, 2 and 4.
    assert {(row["n"], row["step"]) for row in result["rows"]} == {(n, s) for n in (40, 60) for s in (1, 2, 4)}
    wanted = {"estimator", "batch", "n", "m", "seed", "step", "mse", "bias", "worst_decile", "seconds_per_step"}
    assert all(wanted <= set(row) for row in result["rows"])
    assert {row["estimator"] for row in result["gradients"]} == {*labels, "exact"}
    page = (out / "index.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "http:" not in page
    assert "https:" not in page, "self-contained"
    assert "2/2 b12-shards3-seed0" in text
    assert "kept from before" not in text

    # A further seed: what is there is kept, bit for bit.
    assert cli.main(arguments(shards, out, *more[:2], "1", *more[2:])) == 0
    assert capsys.readouterr().out.count("kept from before") == 2
    again = json.loads((out / "result.json").read_bytes())
    assert [row for row in again["rows"] if row["seed"] == 0] == result["rows"]
    assert cli.main(arguments(shards, out, "--seeds", "0", "--steps", "4")) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_watchers_do_not_disturb_the_training_or_each_other(shards: Path, tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    assert cli.main(arguments(shards, few, "--seeds", "3")) == 0
    assert cli.main(arguments(shards, many, "--seeds", "3", "--sweeps", *SWEEPS)) == 0

    def errors(folder: Path) -> dict[tuple[str, int], float]:
        rows = json.loads((folder / "result.json").read_bytes())["rows"]
        return {(row["estimator"], row["step"]): row["mse"] for row in rows}

    alone, together = errors(few), errors(many)
    assert len(together) > 3 * len(alone)
    assert {key: together[key] for key in alone} == alone


def test_chosen_estimators_give_what_they_give_among_all(shards: Path, tmp_path: Path) -> None:
    def rows(folder: Path) -> dict[tuple[str, int], float]:
        listed = json.loads((folder / "result.json").read_bytes())["rows"]
        return {(row["estimator"], row["step"]): row["mse"] for row in listed}

    few, all_of_them = tmp_path / "few", tmp_path / "all"
    chosen = ["--estimators", "queue", "NPN, T_u 1"]
    assert cli.main(arguments(shards, few, "--seeds", "3", "--sweeps", "updates", *chosen)) == 0
    assert cli.main(arguments(shards, all_of_them, "--seeds", "3", "--sweeps", "updates")) == 0
    assert {label for label, _ in rows(few)} == {"mini-batch", "queue", "NPN, T_u 1"}
    assert rows(few).items() <= rows(all_of_them).items()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sweeps", "sizes"], "sweeps = 'sizes': no such sweep"),
        (["--estimators", "queue", "NPN, T_u 1"], "estimators = 'NPN, T_u 1': no such estimator"),
        (["--shards", "9"], "shards = 9: "),
        (["--driver", "siglip"], "driver = 'siglip': it has no normalizer"),
        (["--driver", "isogclr"], "driver = 'isogclr': its temperatures are each pair's own"),
        (["--driver", "fastclip-v2"], "driver = 'fastclip-v2': its temperatures are each pair's own"),
        (["--seeds", "0", "0"], "b12-shards3-seed0': this trajectory is asked for twice"),
        (["--shards", "0", "3"], "asked for twice"),
        (["--seeds"], "seeds = []: no trajectory would be trained"),
        (["--measure-every", "0"], "measure_every = 0: too small"),
        (["--threads", "-1"], "threads = -1: too small"),
    ],
)
def test_bad_usage(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert cli.main(arguments(shards, tmp_path / "study", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_trajectory_is_kept_by_contents_not_by_names(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "toy.yaml", tmp_path / "study"
    shutil.copy(shards.with_name("toy.yaml"), recipe)
    shutil.copytree(shards, tmp_path / "shards")

    def study(folder: str) -> int:
        return cli.main(arguments(tmp_path / folder, out, "--seeds", "0", "--estimators", "queue"))

    assert study("shards") == 0
    (kept,) = (out / "trajectories").iterdir()
    part = json.loads(kept.read_bytes())
    assert (part["torch"], part["fingerprint"]["threads"]) == (str(torch.__version__), 1)
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    capsys.readouterr()
    assert study("moved") == 0
    assert "kept from before" in capsys.readouterr().out, "the same data in another folder"
    recipe.write_text(recipe.read_text("utf-8").replace("weight_decay: 0.1", "weight_decay: 0.3"))
    assert study("moved") == 2
    assert "made with other settings (recipe.optim.weight_decay)" in capsys.readouterr().err
    shutil.copy(shards.with_name("toy.yaml"), recipe)
    shutil.rmtree(tmp_path / "moved")
    write_synthetic_shards(tmp_path / "moved", num_samples=54, samples_per_shard=18, image_size=40, seed=1)
    assert study("moved") == 2
    assert "made with other settings (data)" in capsys.readouterr().err


def row(estimator: str, seed: int, step: int, mse: float, n: int = 100, batch: int = 10) -> dict[str, Any]:
    return {
        "estimator": estimator, "seed": seed, "step": step, "n": n, "batch": batch, "mse": mse, "bias": 0.0,
        "worst_decile": mse, "seconds_per_step": 0.1,
    }  # fmt: skip


def test_summary_is_a_mean_of_seeds_with_its_standard_error() -> None:
    rows = [row("mini-batch", seed, step, 4.0 + seed) for seed in (0, 2) for step in (1, 10)]
    rows += [row("NPN", seed, 10, 1.0 + seed) for seed in (0, 2)]
    assert {r["step"] for r in late(rows)} == {10}
    base, npn = summarise(late(rows))
    assert (base["mse"], npn["mse"], npn["num_seeds"]) == (5.0, 2.0, 2)
    assert npn["mse_error"] == pytest.approx(1.0)  # values 1 and 3: deviation sqrt(2), over sqrt(2)
    assert npn["mse_over_batch"] == pytest.approx(0.4)
    assert summarise([row("mini-batch", 0, 1, 4.0)])[0]["mse_error"] is None


def test_findings_say_when_a_claim_does_not_hold() -> None:
    rows = [row("mini-batch", 0, 1, 1.0), row("NPN", 0, 1, 0.5), row("NPN, T_u 1", 0, 1, 0.4)]
    (sentence,) = findings(summarise(rows))
    assert "worse than the NPN as published in 0 of 1 settings (0.80)" in sentence


def test_findings_compare_two_ratios_of_n_to_the_batch() -> None:
    rows = [row("mini-batch", 0, 1, 1.0), row("mini-batch", 0, 1, 3.0, n=1000), row("queue, M 8", 0, 1, 0.1)]
    rows += [row("NPN", 0, 1, 0.5), row("NPN", 0, 1, 0.5, n=1000)]
    assert findings(summarise(rows)) == [
        "mini-batch: the error at n/B = 100 is 3.0 times that at 10.",
        "NPN: the error at n/B = 100 is 1.0 times that at 10.",
    ]


@pytest.mark.parametrize(("num_batches", "batch"), [(1, 8), (5, 40), (5, 64)])
def test_gradients_that_could_not_be_told_apart_are_refused_before_the_training(num_batches: int, batch: int) -> None:
    with pytest.raises(ConfigError, match=r"gradient_batches = .*take two batches.*more --shards"):
        GradientProbe(num_batches=num_batches, batch=batch, seed=0).check(60)
    GradientProbe(num_batches=2, batch=30, seed=0).check(60)


def test_moments_give_bias_without_what_few_draws_add() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, generator=generator)
    shift = 0.5 * torch.randn(400, generator=generator)
    moments, noise = _Moments(), 3.0
    for _ in range(50):
        draw = truth + shift + noise * torch.randn(400, generator=generator)
        moments.add(draw, torch.ones(4, 2))
    result = moments.row(truth)
    norm = float(truth.norm())
    assert result["gradient_bias"] == pytest.approx(float(shift.norm()) / norm, rel=0.1)
    assert result["gradient_noise"] == pytest.approx(noise * 20 / norm, rel=0.05)
    assert result["anchor_share"] == 1.0


def test_squared_biases_are_averaged_before_the_root() -> None:
    """Where there is no bias its squares fall on both sides of 0; roots of those above would add up to one."""
    place = {"estimator": "NPN", "n": 100, "batch": 10, "gradient_noise": 1.0, "cosine": 1.0, "anchor_share": 1.0}
    squares = {0: 0.04, 1: -0.05, 2: 0.01}
    rows = [{**place, "seed": seed, "gradient_bias_squared": square} for seed, square in squares.items()]
    (none,) = summarise_gradients(rows)
    assert none["gradient_bias"] == 0
    assert none["gradient_bias_resolution"] == pytest.approx((2 * none["gradient_bias_squared_error"]) ** 0.5)
    (some,) = summarise_gradients(
        [{**each, "gradient_bias_squared": each["gradient_bias_squared"] + 0.09} for each in rows]
    )
    assert some["gradient_bias"] == pytest.approx(0.09**0.5)
    assert summarise_gradients(rows[:1])[0]["gradient_bias_resolution"] is None


def test_exact_normalizers_have_no_bias(shards: Path, tmp_path: Path) -> None:
    """Over many batches the squared bias is 0 within its error, which batches of one epoch would not give."""
    more = ["--gradient-batches", "40", "--estimators", "queue"]
    assert cli.main(arguments(shards, tmp_path, "--seeds", "0", "1", "2", *more)) == 0
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert {row["num_batches"] for row in result["gradients"]} == {40.0}, "more than the five of an epoch"
    exact = next(row for row in summarise_gradients(result["gradients"]) if row["estimator"] == "exact")
    added = exact["gradient_noise"] ** 2 / 40
    assert abs(exact["gradient_bias_squared"]) < max(4 * exact["gradient_bias_squared_error"], 0.3 * added)


def test_a_page_escapes_what_it_shows(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    Page(hostile, [Section(hostile, [hostile], [hostile], [[hostile]], code=hostile)]).write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7
