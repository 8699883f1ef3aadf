"""What the benchmarks refuse before they measure, and what of a result outlives a failure after it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tools/bench.py`, whose sections measure nothing."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench

    def never(options: Any) -> dict[str, Any]:
        raise AssertionError("it was measured")

    sections = {name: section._replace(measure=never) for name, section in bench.SECTIONS.items()}
    monkeypatch.setattr(bench, "SECTIONS", sections)
    return bench


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ("step --contenders 'ours, openclp'", "--contenders 'ours, openclp': there is no such name"),
        ("step --contenders 'open_clip, compiled'", "no such name with --device cpu"),
        ("step --contenders 'ours, openclip, micro-batches, graphs'", "no such name with --device cpu"),
        ("step --device cuda --contenders 'ours, openclip, micro-batches, graphs'", "with --device cuda"),
        ("step --contenders", "--contenders: no name was given. Choose from open_clip; "),
        ("step --micro-batches 3", "--micro-batches 3: it does not divide --batch-size 512"),
        ("step --repeats 0", "--repeats 0: nothing would be measured. Give 1 or more."),
        ("gradcache --contenders 'ours, haf kept'", "Choose from plain; ours, one micro-batch; "),
        ("loader --contenders 'ours, pillow'", "ours, decoder=pillow; "),
        ("loader --num-pictures 8 --num-workers 9", "--num-workers 9: each needs a shard of --num-pictures 8"),
        ("layers --contenders tritn", "Choose from torch; triton."),
        ("kernels --contenders openclip", "Choose from kernels; triton; torch; open_clip."),
        ("kernels --contenders open_clip --forms margin", "Choose from InfoNCE; SigLIP."),
        ("kernels --forms infonce", "Choose from InfoNCE; margin; SigLIP."),
        ("startup --contenders 'neuclip --hlp'", "Choose from neuclip --help; "),
        ("checkpoint --contenders foo", "Choose from torch.save; "),
        ("npn --contenders torch", "Choose from torch highest; torch high; "),
        ("npn --contenders 'torch high graphs'", "triton high graphs"),
        ("loss --contenders exact", "rgcl-g; "),
        ("loss --scaling 1024", "--scaling 1024: growth is fitted to several sizes."),
        ("reshard --keep 0", "--keep 0.0: no share of which something is kept."),
    ],
)
def test_what_could_not_be_measured_under_its_name_is_refused(bench: Any, arguments: str, refused: str) -> None:
    name, *rest = shlex.split(arguments)
    with pytest.raises(SystemExit, match=r"Choose|Give") as raised:
        bench.run(name, rest)
    assert refused in str(raised.value)


@pytest.mark.parametrize("arguments", ["step --precision fp16", "step --device gpu", "npn --device cuda:0"])
def test_devices_and_precisions_are_chosen_among_those_that_exist(bench: Any, arguments: str) -> None:
    name, *rest = arguments.split()
    with pytest.raises(SystemExit) as raised:
        bench.run(name, rest)
    assert raised.value.code == 2


def test_each_sections_own_contenders_are_let_through(bench: Any) -> None:
    for name, section in bench.SECTIONS.items():
        for arguments in ((), section.small):
            with pytest.raises(AssertionError, match="it was measured"):
                bench.run(name, arguments)


def test_every_gpu_run_is_let_through(bench: Any) -> None:
    import bench_everything_gpu

    for name, *arguments in bench_everything_gpu.RUNS.values():
        with pytest.raises(AssertionError, match="it was measured"):
            bench.run(name, arguments)


def test_a_result_that_could_not_be_written_is_not_measured(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(SystemExit, match=r"could not be written there .* Name a file"):
            bench.run("audit", ["--json", str(path)])


def test_a_result_is_written_before_it_is_shown(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Any, result: dict[str, Any]) -> None:
        raise ValueError("no such figure")

    section = bench.SECTIONS["audit"]._replace(measure=lambda options: {"rows": [{"listed": 3}]}, show=fail)
    monkeypatch.setitem(bench.SECTIONS, "audit", section)
    with pytest.raises(ValueError, match="no such figure"):
        bench.run("audit", ["--json", str(tmp_path / "new" / "result.json")])
    assert json.loads((tmp_path / "new" / "result.json").read_text())["rows"] == [{"listed": 3}]
