"""`neuclip`: help, versions, unknown commands, and errors as people see them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import neuclip_scale
from neuclip_scale import cli
from neuclip_scale.checkpoint import CheckpointError
from neuclip_scale.config import ConfigError
from neuclip_scale.data.synthetic import write_synthetic_shards


def neuclip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neuclip_scale", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_lists_every_command_and_is_quick() -> None:
    started = time.perf_counter()
    done = neuclip("--help")
    assert time.perf_counter() - started < 0.5 * 4  # 0.08 s alone; the factor is for a busy machine
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["--help"], ["study", "methods", "--help"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    """As `neuclip ... | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "neuclip_scale", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_no_standard_output_at_all_is_no_error() -> None:
    command = [sys.executable, "-m", "neuclip_scale", "--help"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_below_standard_output_is_told_in_one_line(unbuffered: str) -> None:
    command = [sys.executable, "-m", "neuclip_scale", "--help"]
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environ, timeout=120)
    told = b"error: standard output: No space left on device. Send it elsewhere, or mend its place.\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_a_connection_that_breaks_is_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError):
        command_raising(monkeypatch, BrokenPipeError())()


def test_no_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: neuclip COMMAND" in capsys.readouterr().err


def test_version() -> None:
    assert neuclip("--version").stdout == f"neuclip {neuclip_scale.__version__}\n"


def test_version_is_the_one_of_pyproject() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    fixed = re.search(r'^version = "(.*)"', text, re.MULTILINE)
    assert fixed is None or fixed[1] == neuclip_scale.__version__


@pytest.mark.parametrize(("name", "hint"), [("trian", "Did you mean train?"), ("zzz", "Commands: train, data, plan,")])
def test_unknown_command(capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    assert cli.main([name]) == 2
    assert f"error: there is no command '{name}'. {hint}" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main([name, "--help"])
    except SystemExit as stop:  # how argparse and tyro end
        status = int(stop.code or 0)
    assert status == 0
    assert f"neuclip {name}" in capsys.readouterr().out


def command_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[[], int]:
    module = types.ModuleType("raising")

    def main(argv: list[str]) -> int:
        raise error

    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "raising", module)
    monkeypatch.setitem(cli.COMMANDS, "raising", ("raising", "Raises."))
    return lambda: cli.main(["raising"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("train.num_steps", 0, "the run has no length", "Give it."), 2),
        (CheckpointError("shared.pt is missing. Use another."), 1),
    ],
)
def test_errors_for_people_have_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    assert command_raising(monkeypatch, error)() == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_predicate_that_cannot_be_understood_is_bad_usage(tmp_path: Path) -> None:
    write_synthetic_shards(tmp_path / "pool", num_samples=2, samples_per_shard=2, image_size=8, seed=0)
    given = ["reshard", "-i", str(tmp_path / "pool"), "-o", str(tmp_path / "out"), "-j", "1", "--where", "score >"]
    assert cli.main(given) == 2
    assert not (tmp_path / "out").exists()


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        command_raising(monkeypatch, ZeroDivisionError("bug"))()


def test_a_place_where_nothing_can_be_written_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = ["plan", "demo", "--gpus-per-node", "1", "--no-alternatives"]
    assert cli.main([*given, "--json", str(tmp_path / "file/plan.json")]) == 1
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'file'}" in said
    assert "Choose another place" in said


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_raising(monkeypatch, KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_public_names_load() -> None:
    assert set(neuclip_scale.__all__) <= set(dir(neuclip_scale))
    for name in neuclip_scale.__all__:
        assert getattr(neuclip_scale, name) is not None
    assert not hasattr(neuclip_scale, "nothing")
