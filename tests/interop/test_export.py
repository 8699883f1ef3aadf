"""What `neuclip export` writes, read by the libraries it is written for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from neuclip_scale import cli
from neuclip_scale.checkpoint import save_checkpoint
from neuclip_scale.commands.export import model_card
from neuclip_scale.config import Recipe, dump_recipe, load_recipe
from neuclip_scale.data.transforms import EvalTransform
from neuclip_scale.models.building import build_model
from neuclip_scale.models.clip import CLIP
from neuclip_scale.models.loading import load_pretrained
from neuclip_scale.models.tokenizer import CLIPTokenizer

TEXTS = ["a red balloon", "caf\u00e9 \u2615, twice", "a very long caption " * 9]


KILLED = """
import os, signal, sys
from neuclip_scale import cli
from neuclip_scale.models import export
export._hf_config = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


def make_run(folder: Path, **overrides: object) -> tuple[CLIP, Recipe]:
    """A run folder with a checkpoint of random weights, none of them at a default."""
    recipe = load_recipe("demo", {"data.train": "/somewhere", **overrides})
    torch.manual_seed(0)
    model = build_model(recipe).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    own = {"parameters": {name: {"value": value} for name, value in model.named_parameters()}}
    shared = {"buffers": dict(model.named_buffers()), "recipe": dump_recipe(recipe)}
    save_checkpoint(folder / "checkpoints", 5, shared, own, keep=1)
    summary = {
        "dataset_size": 12321, "samples_seen": 640, "samples_skipped": 3,
        "evaluation": {"zeroshot": {"top1": 0.125}}, "cost": {"device_hours": 0.5},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return model, recipe


def export(run: Path, form: str, output: Path) -> Path:
    assert cli.main(["export", str(run), "--format", form, "--output", str(output)]) == 0
    return output


def picture(size: tuple[int, int] = (50, 37)) -> Image.Image:
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("objective", ["neuclip", "siglip"])
def test_open_clip_computes_the_same(open_clip: ModuleType, tmp_path: Path, objective: str) -> None:
    model, _ = make_run(tmp_path / "run", **{"objective.name": objective})
    folder = export(tmp_path / "run", "open_clip", tmp_path / "out")
    peer, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    peer.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(tokens, CLIPTokenizer(model.context_length)(TEXTS))
    pixels = preprocess(picture())[None]
    ours = EvalTransform(model.image_size, model.image_mean, model.image_std)(picture())[None]
    torch.testing.assert_close(ours, pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        output = model(ours, tokens)
        image, text = peer.encode_image(pixels, normalize=True), peer.encode_text(tokens, normalize=True)
    torch.testing.assert_close(image, output.image_features, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, output.text_features, rtol=0, atol=1e-5)
    torch.testing.assert_close(peer.logit_scale.exp().reshape(1), output.logit_scale)
    if objective == "siglip":
        torch.testing.assert_close(peer.logit_bias.reshape(1), output.logit_bias)
    again = load_pretrained(folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    import transformers

    model, _ = make_run(tmp_path / "run")
    folder = export(tmp_path / "run", "hf", tmp_path / "out")
    peer, report = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    peer.eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    length = model.context_length
    given = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    tokens = CLIPTokenizer(length)(TEXTS)
    for row, theirs, mask in zip(tokens, given["input_ids"], given["attention_mask"]):
        assert torch.equal(row[mask.bool()], theirs[mask.bool()])
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(picture((40, 40)), return_tensors="pt")["pixel_values"]
    ours = EvalTransform(model.image_size, model.image_mean, model.image_std)(picture((40, 40)))[None]
    # Bicubic filters differ in rounding to 8 bits: a few 255ths, over the channels' deviation.
    torch.testing.assert_close(ours, pixels, rtol=0, atol=0.06)
    with torch.no_grad():
        output = model(ours, tokens)
        theirs = peer(input_ids=given["input_ids"], attention_mask=given["attention_mask"], pixel_values=ours)
    torch.testing.assert_close(theirs.image_embeds, output.image_features, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.text_embeds, output.text_features, rtol=0, atol=1e-5)
    expected = output.logit_scale * output.image_features @ output.text_features.T
    torch.testing.assert_close(theirs.logits_per_image, expected, rtol=1e-4, atol=1e-4)


def test_the_bare_tensors_and_the_card(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, _ = make_run(tmp_path / "run")
    folder = export(tmp_path / "run", "safetensors", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    card = (folder / "README.md").read_text()
    for said in (
        "trained by neuclip",
        "/somewhere",
        "12321 pairs",
        "640 seen",
        "3 skipped",
        "top1: 0.1250",
        "device_hours",
    ):
        assert said in card


@pytest.mark.parametrize(
    ("decay", "weights", "told"),
    [
        (0.0, "auto", "The weights are those of the last step."),
        (0.9, "auto", "The weights are a running average of the steps' (decay 0.9)."),
        (0.9, "last", "those of the last step, and the scores below those of their running average."),
    ],
)
def test_the_card_says_whose_scores_they_are(tmp_path: Path, decay: float, weights: str, told: str) -> None:
    assert told in model_card(tmp_path, load_recipe("demo", {"optim.ema_decay": decay}), "hf", weights)


def test_the_card_of_a_checkpoint_says_what_was_known_then(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = tmp_path / "run/summary.json"
    checkpoint = tmp_path / "run/checkpoints/step_000000005"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 5}))
    assert "top1: 0.1250" in model_card(checkpoint, load_recipe("demo"), "hf")
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 10}))
    line = {"step": 5, "samples_seen": 320, "evaluation": {"zeroshot": {"top1": 0.0625}}}
    (tmp_path / "run/evaluations.jsonl").write_text(f"{json.dumps(line)}\nnonsense\n")
    card = model_card(checkpoint, load_recipe("demo"), "hf")
    assert "12321 pairs, 320 seen, unknown skipped" in card
    assert "top1: 0.0625" in card
    assert "device_hours" not in card
    (tmp_path / "run/evaluations.jsonl").unlink()
    assert "Not evaluated." in model_card(checkpoint, load_recipe("demo"), "hf")


@pytest.mark.parametrize("summary", ["{", "[]", "\xff"])
def test_a_spoiled_summary_is_none(tmp_path: Path, summary: str) -> None:
    (tmp_path / "summary.json").write_bytes(summary.encode("latin-1"))
    assert "Not evaluated." in model_card(tmp_path, load_recipe("demo"), "hf")


def test_what_cannot_be_written_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", **{"objective.name": "siglip"})
    arguments = ["export", str(tmp_path / "run"), "--format", "hf", "--output"]
    assert cli.main([*arguments, str(tmp_path / "out")]) == 2
    assert "bias" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert cli.main([*arguments, str(tmp_path / "full")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), "--format", "hf", "--output", str(tmp_path / "new")]) == 1
    assert "no intact checkpoint" in capsys.readouterr().err


def test_an_export_that_was_killed_is_written_again(tmp_path: Path) -> None:
    """Until it is whole nothing has the name that a reader looks for."""
    make_run(tmp_path / "run")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, "export", str(tmp_path / "run"), "--format", "hf", "--output", str(out)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left = [path.name for path in out.iterdir()]
    assert left == [".unfinished"]
    assert (out / left[0] / "model.safetensors").is_file()
    assert cli.main(command[3:]) == 0
    assert {"README.md", "config.json", "model.safetensors"} < {path.name for path in out.iterdir()}
    assert not (out / left[0]).exists()
    assert cli.main(command[3:]) == 2
