"""`neuclip doctor` on this machine, and on machines with something wrong."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from neuclip_scale.commands import doctor
from neuclip_scale.engines import compiling
from neuclip_scale.preflight.machine import ProbeError, all_reduce, worker_memory


def only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name]})


@pytest.mark.distributed
def test_this_machine(tmp_path: Path) -> None:
    """Every check runs for real; those of the software must be well, or no other test could pass."""
    command = [sys.executable, "-m", "neuclip_scale", "doctor", "--json", str(tmp_path / "doctor.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    written = json.loads((tmp_path / "doctor.json").read_text())
    found = {row["check"]: row for row in written["checks"]}
    assert list(found) == list(doctor.CHECKS)
    for name in ("Python", "torch", "torchvision", "tokenizer", "data workers", "gloo"):
        assert found[name]["status"] == "ok", found[name]
    for row in found.values():
        assert row["detail"]
        assert (row["status"] == "ok") == (not row["remedy"]), row
    assert done.returncode == (0 if written["ok"] else 1)
    assert "checking gloo" in done.stderr
    assert "two processes" in done.stdout


@pytest.mark.parametrize("fault", ["", "torch.compile does not run here (InductorError)"])
def test_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiling, "compiler_fault", lambda device: fault)
    found = doctor.check_compiler()
    assert found.status == ("warning" if fault else "ok")
    assert ("gcc and python3-dev" in found.remedy) == bool(fault)


@pytest.mark.parametrize(("limit", "status"), [(200, "problem"), (800, "warning"), (1024, "ok")])
def test_few_open_files(tmp_path: Path, limit: int, status: str) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < limit:
        pytest.skip(f"this machine allows fewer than {limit} open files")
    script = (
        "import resource, sys; from neuclip_scale.commands import doctor\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        "doctor.CHECKS = {'open files': doctor.check_open_files}\n"
        "sys.exit(doctor.main(['--json', sys.argv[1]]))\n"
    )
    path = tmp_path / "doctor.json"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == (1 if status == "problem" else 0), done.stderr
    row = json.loads(path.read_text())["checks"][0]
    assert row["status"] == status
    assert f"limit {limit}" in row["detail"]
    assert ("ulimit -n 4096" in row["remedy"]) == (status != "ok")


def test_a_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    monkeypatch.setenv("COLUMNS", "300")
    only(monkeypatch, "torchvision")
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "operator torchvision::nms does not exist" in shown
    assert "pip install --force-reinstall torch torchvision" in shown


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    finding = doctor.check_disk()
    assert finding.status == "problem"
    assert "NEUCLIP_CACHE" in finding.remedy
    assert doctor.check_shared_memory().status == "warning"


def test_missing_npm_is_no_problem_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    finding = doctor.check_demo_tools()
    assert finding.status == "warning"
    assert "[demo,npm]" in finding.remedy


@pytest.mark.distributed
def test_a_collective_that_hangs_is_given_up() -> None:
    with pytest.raises(ProbeError, match="no answer within"):
        all_reduce("gloo", 2, seconds=0.05)


@pytest.mark.distributed
def test_a_backend_that_fails_says_why() -> None:
    with pytest.raises(ProbeError, match=r"(?i)nonsense"):
        all_reduce("nonsense", 1, seconds=60.0)


def test_workers_deliver() -> None:
    worker_memory(60.0)


def test_memory_is_what_the_limits_of_a_container_and_of_slurm_leave(tmp_path: Path) -> None:
    def group(name: str, limit: str, current: int, cached: int) -> None:
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon {current - cached}\ninactive_file {cached}\n")

    root, step = tmp_path / "cgroup", "slurmstepd.scope/job_7/step_0"
    assert doctor.memory_left(root, "") == math.inf
    group(step, "max", 100, 0)
    group("slurmstepd.scope/job_7", "1000", 900, 700)  # files that were read fill what nobody else wants
    assert doctor.memory_left(root, f"4:memory:/old\n0::/{step}\n") == 800
    for name, text in {"memory.max": "500", "memory.current": "450", "memory.stat": "inactive_file 50"}.items():
        (root / name).write_text(text)
    assert doctor.memory_left(root, f"0::/{step}\n") == 100
    assert doctor.memory_left(root, "0::/\n") == 100
