"""The scripts by themselves: what they ask Slurm for, and that the example of a site's settings works."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from slurm_runs import SCRIPTS, program

SCALES = {"small": (1, 4096), "medium": (1, 4096), "large": (2, 8192), "xl": (16, 90112)}


@pytest.mark.parametrize("scale", SCALES)
def test_defaults_of_a_training_script(scale: str) -> None:
    text = (SCRIPTS / f"train_{scale}.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert asked["nodes"] == str(SCALES[scale][0])
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["signal"] == "B:USR1@300"
    assert {"requeue", "exclusive"} <= asked.keys()
    assert asked["open-mode"] == "append"


@pytest.mark.parametrize(
    ("name", "value"), [("TASKS_PER_NODE", "four"), ("TRIES", "0"), ("CHAIN", "-1"), ("RANK_WAIT", "0")]
)
def test_settings_that_are_no_numbers_are_told_before_the_queue(tmp_path: Path, name: str, value: str) -> None:
    variables = {"NEUCLIP_SITE": str(tmp_path / "none"), "PATH": "/usr/bin:/bin", f"NEUCLIP_{name}": value}
    command = [SCRIPTS / "train_small.sh", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    told = f"error: NEUCLIP_{name} '{value}': give a number, 1 or more\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_every_script_finds_the_folder_it_came_from() -> None:
    """In a job by its own name, which a copied script easily has wrong."""
    found = [path for path in SCRIPTS.glob("*.sh") if path.read_text().startswith("#!")]
    assert len(found) >= 6
    for path in found:
        name = path.name.replace(".", r"\.")
        assert rf"Command=\(.*\)/{name}.*|" in path.read_text(), path
        assert os.access(path, os.X_OK), path


def test_the_example_of_a_sites_settings_fits_the_largest_scale(tmp_path: Path) -> None:
    """On 8 GPUs of 80 GiB a node, without Slurm: the check needs none."""
    nodes, batch = SCALES["xl"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "NEUCLIP_"))}
    variables |= {"NEUCLIP_SITE": str(SCRIPTS / "site.env.example"), "NEUCLIP": program(tmp_path), "USER": "me"}
    command = [SCRIPTS / "train_xl.sh", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{batch} pairs a step over {8 * nodes} ranks" in done.stderr
    assert "of 80 GiB on each" in done.stderr
    assert not list(tmp_path.glob("runs*"))
