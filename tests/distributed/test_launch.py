"""Where a process stands, from the launcher's variables; results and errors of rank 0 on every rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from neuclip_scale import distributed
from neuclip_scale.config import ConfigError
from neuclip_scale.distributed import Launch, read_launch


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch(0, 1, 0, "single")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(3, 8, 1, "torchrun")),
        (
            {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            Launch(9, 16, 1, "srun"),
        ),
        # A batch script's own shell: it has the job's task count, but is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, Launch(0, 1, 0, "single")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, Launch(0, 1, 0, "single")),
        # The shell of `salloc` where it is a step.
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "16",
                "SLURM_STEP_ID": "4294967290",
                "SLURM_STEP_NUM_TASKS": "1",
            },
            Launch(0, 1, 0, "single"),
        ),
    ],
)
def test_launchers(environ: dict[str, str], expected: Launch) -> None:
    assert read_launch(environ) == expected


def test_steps_of_one_job_meet_apart_and_without_scontrol_the_remedy_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ports = set()
    for step in ("0", "1"):
        for name in ("MASTER_PORT", "MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.setenv(name, "")  # put back at the end
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setenv("SLURM_STEP_ID", step)
        monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match=r"MASTER_ADDR = '': is not set, .* n\[1-2\] .*Export the first node"):
            distributed._export_rendezvous(Launch(1, 2, 0, "srun"))
        monkeypatch.setenv("MASTER_ADDR", "n1")
        distributed._export_rendezvous(Launch(1, 2, 0, "srun"))
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 2


def test_a_group_of_gpus_takes_what_is_offloaded_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2's norm of offloaded gradients is added up there, which NCCL cannot."""
    asked: list[str] = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    # A test before this one, in the same process, may have left a group of its own.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    for host_tensors in (False, True):
        distributed.initialize("cuda", host_tensors=host_tensors)
        distributed.ensure_process_group(torch.device("cuda", 0), host_tensors=host_tensors)
    distributed.initialize("cpu", host_tensors=True)
    assert asked == ["nccl", "nccl", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl", "gloo"]


def on_every_rank() -> tuple[str, str]:
    result = distributed.on_main(lambda: f"from rank {distributed.rank()}")

    def refuse() -> None:
        raise ConfigError("data.train", "x", "is wrong", "Mend it.")

    try:
        distributed.on_main(refuse)
    except ConfigError as error:
        return result, str(error)
    return result, "no error"


class LibraryError(Exception):
    """Pickle makes it anew from its message alone, which fails."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"{words}, code {code}")
        self.held = lambda: code


def odd_error_on_every_rank() -> str:
    def refuse() -> None:
        raise LibraryError(7, "no such bucket")

    try:
        distributed.on_main(refuse)
    except Exception as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
def test_an_error_that_pickle_cannot_send_reaches_every_rank_in_words() -> None:
    words = "no such bucket, code 7"
    assert run_ranks(2, odd_error_on_every_rank) == [words, f"LibraryError: {words}"]


@pytest.mark.distributed
def test_results_and_errors_of_rank_0_reach_every_rank() -> None:
    expected = ("from rank 0", "data.train = 'x': is wrong. Mend it.")
    assert run_ranks(2, on_every_rank) == [expected, expected]
