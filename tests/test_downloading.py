"""img2dataset's own environment: where it cannot be made, one line says why and what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from neuclip_scale import downloading
from neuclip_scale.downloading import DownloadingError, img2dataset_environment


def test_it_lies_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEUCLIP_CACHE", str(tmp_path))
    assert downloading.default_folder() == tmp_path / "img2dataset-1.47"
    monkeypatch.delenv("NEUCLIP_CACHE")
    assert downloading.default_folder() == Path.home() / ".cache/neuclip-scale/img2dataset-1.47"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadingError, match=r"file/x/env.*NEUCLIP_CACHE"):
        img2dataset_environment(tmp_path / "file" / "x" / "env")


def test_without_an_index_the_failure_and_the_remedy_are_told_and_nothing_counts_as_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(DownloadingError, match=r"No matching distribution.*copy .*env from one that has"):
        img2dataset_environment(tmp_path / "env")
    assert list(tmp_path.glob("env/bin/python"))
    assert not list(tmp_path.glob("env/complete*"))


def test_the_command_runs_img2dataset() -> None:
    try:
        python = img2dataset_environment()
    except DownloadingError as error:
        pytest.skip(str(error))
    command = [*downloading.img2dataset_command(python), "--help"]
    done = subprocess.run(command, env=downloading.img2dataset_variables(), capture_output=True, text=True, check=False)
    assert "number_sample_per_shard" in done.stdout + done.stderr
