"""open_clip's trainer reads our shards and takes our losses: examples/open_clip_trainer.py, as a user runs it."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from neuclip_scale.data.synthetic import write_synthetic_shards

SCRIPT = Path(__file__).parents[2] / "examples" / "open_clip_trainer.py"


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_it_trains(tmp_path: Path) -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 40
    write_synthetic_shards(tmp_path / "shards", num_samples=24, samples_per_shard=12, image_size=40, seed=1)
    arguments = f"""
        --loss neuclip --model ViT-S-32 --train-data {tmp_path}/shards/{{00000..00001}}.tar --train-num-samples 24
        --dataset-type webdataset --batch-size 8 --epochs 1 --workers 1 --device cpu --precision fp32 --warmup 1
        --logs {tmp_path}/logs --name run --log-every-n-steps 1 --lr 1e-5
    """.split()
    done = run(arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"Contrastive_loss: (\S+)", done.stderr)]
    assert len(losses) == 3
    # NeuCLIP's loss is scaled by tau: below log B at the start, where InfoNCE would stand.
    assert all(math.isfinite(loss) and loss < math.log(8) for loss in losses)
    saved = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert saved["epoch"] == 1
    done = run([*arguments, "--accum-freq", "2", "--name", "other"])
    assert done.returncode == 2
    assert "--accum-freq: a loss that learns would learn of each batch several times" in done.stderr
