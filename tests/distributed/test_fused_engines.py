"""Runs the cases of engines with the towers' own kernels, in a process where Triton interprets from the start."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_cases() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    case = str(FOLDER / "cases_fused_engines.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", case]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "3 passed" in done.stdout
