"""Runs the Triton cases: on a CPU in Triton's interpreter, which must be chosen before Triton is imported, and on a GPU
where there is one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


@needs_triton
@DEVICES
def test_cases(device: str) -> None:
    assert num_passed(device, "not long") >= 60


@needs_triton
@pytest.mark.long
@DEVICES
def test_long_cases(device: str) -> None:
    assert num_passed(device, "long") >= 7


def num_passed(device: str, kind: str) -> int:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: the kernels ran in Triton's interpreter only")
    environment = {**os.environ, "TRITON_TEST_DEVICE": device, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    environment.pop("NEUCLIP_SIMILARITY", None)
    cases = sorted(map(str, FOLDER.glob("cases_triton_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", kind, *cases]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])
