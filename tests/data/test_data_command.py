"""`neuclip data index` and `check`, and training from what they write."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from data_helpers import make_loader, take

from neuclip_scale.cli import main
from neuclip_scale.config import ConfigError, DataConfig
from neuclip_scale.data.indexing import Describe
from neuclip_scale.data.manifest import Manifest, ManifestError, build_manifest
from neuclip_scale.data.run_manifest import run_manifest
from neuclip_scale.data.shards import ShardError, expand_shards
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.files import write_text


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_synthetic_shards(tmp_path / "set", 45, 8, 24, seed=1)
    return tmp_path / "set"


def index(shards: Path, output: Path, *options: str) -> Manifest:
    assert main(["data", "index", str(shards), "--output", str(output), "--workers", "2", *options]) == 0
    return Manifest.load(output)


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_manifest_moves_with_its_shards_and_trains_the_same(shards: Path, tmp_path: Path, suffix: str) -> None:
    made = index(shards, shards / f"manifest.{suffix}", "--sha256")
    assert made.num_samples == 45
    assert all(len(shard.sha256) == 64 for shard in made.shards)
    before = run_manifest(tmp_path / "a" / "manifest.json", DataConfig(train=str(shards)))
    expected = [each.batch.uids for each in take(make_loader(before), 4)]
    moved = shards.rename(tmp_path / "moved")
    after = run_manifest(tmp_path / "b" / "manifest.json", DataConfig(train=str(moved / f"manifest.{suffix}")))
    assert after.fingerprint == before.fingerprint
    assert [each.batch.uids for each in take(make_loader(after), 4)] == expected
    if suffix == "parquet":
        table = pyarrow.parquet.read_table(moved / "manifest.parquet")
        assert table["path"].to_pylist() == sorted(path.name for path in moved.glob("*.tar"))


def test_counts_beside_the_shards_are_taken_over_and_can_be_checked(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "sizes.json").write_text(json.dumps({"00000.tar": 8, "00001.tar": 7, "00002.tar": "x", "00003.tar": -1}))
    (shards / "00004_stats.json").write_text('{"successes": 8}')
    (shards / "00005_stats.json").write_text("{")
    made = index(shards, tmp_path / "m.json", "--json", str(tmp_path / "summary.json"))
    assert [shard.num_samples for shard in made.shards] == [8, 7, 8, 8, 8, 5]
    by = [shard.counted_by for shard in made.shards]
    assert by == ["sizes.json", "sizes.json", "headers", "headers", "_stats.json", "headers"]
    assert json.loads((tmp_path / "summary.json").read_text())["counted_by"] == {
        "sizes.json": 2, "headers": 3, "_stats.json": 1,
    }  # fmt: skip
    assert main(["data", "check", str(tmp_path / "m.json"), "--workers", "1"]) == 1
    assert "00001.tar: samples 8, the manifest says 7" in capsys.readouterr().out
    with pytest.raises(ManifestError, match=r"00001.tar: 8 samples .* but 7"):
        take(make_loader(made), 4)
    whole = index(shards, tmp_path / "m.json", "--read-tars")
    assert [shard.num_samples for shard in whole.shards] == [8, 8, 8, 8, 8, 5]
    assert main(["data", "check", str(tmp_path / "m.json"), "--workers", "1"]) == 0


def test_check_finds_other_bytes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index(shards, tmp_path / "m.parquet", "--sha256")
    path = shards / "00002.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # inside a member
    path.write_bytes(data)
    (shards / "00003.tar").unlink()
    assert main(["data", "check", str(tmp_path / "m.parquet"), "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())["differences"]
    assert len(found) == 2
    assert "00002.tar: sha256" in found[0]
    assert "00003.tar: cannot be read" in found[1]
    assert "2 difference(s)" in capsys.readouterr().out


def test_a_killed_index_goes_on(tmp_path: Path) -> None:
    write_synthetic_shards(tmp_path / "set", 400, 4, 16, seed=1)
    arguments = ["data", "index", str(tmp_path / "set"), "--output", str(tmp_path / "m.json"), "--workers", "1"]
    journal = tmp_path / "m.json.rows.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "neuclip_scale", *arguments], start_new_session=True)
    while not journal.exists() or journal.read_text().count("\n") < 20:
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "m.json").exists()
    with open(journal, "a") as stream:
        stream.write('{"path": "half a li')
    lines = journal.read_text().count("\n")
    assert lines >= 20
    assert main(arguments) == 0
    assert not journal.exists()
    expected = build_manifest(expand_shards(str(tmp_path / "set")))
    assert Manifest.load(tmp_path / "m.json").shards == expected.shards


def test_sources_with_weights(tmp_path: Path, shards: Path) -> None:
    write_synthetic_shards(tmp_path / "other", 20, 5, 24, seed=2)
    index(tmp_path / "other", tmp_path / "other.json")
    section = DataConfig(train=f"{tmp_path}/other.json::{shards}", weights=(1.0, 3.0))
    manifest = run_manifest(tmp_path / "run" / "manifest.json", section)
    assert [shard.source for shard in manifest.shards] == [0] * 4 + [1] * 6
    assert run_manifest(tmp_path / "run" / "manifest.json", section) == manifest
    indices = [
        index for each in take(make_loader(manifest, weights=(1.0, 3.0)), 100) for index in each.batch.sample_index
    ]
    assert 0.2 < sum(int(index) < 20 for index in indices) / len(indices) < 0.3
    with pytest.raises(ConfigError, match=r"data.weights.*2 source"):
        run_manifest(tmp_path / "x.json", DataConfig(train=section.train, weights=(1.0,)))
    with pytest.raises(ConfigError, match="belongs to source 1 too"):
        run_manifest(tmp_path / "x.json", DataConfig(train=f"{shards}::{shards}", weights=(1.0, 1.0)))


def test_a_manifest_that_was_made_anew_is_seen(tmp_path: Path, shards: Path) -> None:
    index(shards, tmp_path / "m.json")
    section = DataConfig(train=str(tmp_path / "m.json"))
    before = run_manifest(tmp_path / "run.json", section)
    write_synthetic_shards(shards, 60, 10, 24, seed=1)
    index(shards, tmp_path / "m.json")
    after = run_manifest(tmp_path / "run.json", section)
    assert (before.num_samples, after.num_samples) == (45, 60)


def test_shards_beside_a_manifest_are_looked_at_again(tmp_path: Path, shards: Path) -> None:
    write_synthetic_shards(tmp_path / "more", 16, 8, 24, seed=2)
    index(shards, tmp_path / "m.json")
    section = DataConfig(train=f"{tmp_path / 'm.json'}::{tmp_path / 'more'}")
    assert run_manifest(tmp_path / "run.json", section).num_samples == 45 + 16
    write_synthetic_shards(tmp_path / "more", 20, 10, 24, seed=2)
    assert run_manifest(tmp_path / "run.json", section).num_samples == 45 + 20


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, shards: Path) -> None:
    output = tmp_path / "m.json"
    command = [sys.executable, "-m", "neuclip_scale", "data", "index", str(shards), "--output", str(output)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limited = 100, before[1]
    done = subprocess.run(
        [*command, "--workers", "1"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limited),
    )
    told = "File too large. Choose another place, or mend this one."
    assert (done.returncode, done.stderr) == (1, f"error: {output}.rows.jsonl: {told}\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, limited)
    try:
        with pytest.raises(OSError, match="too large") as caught:  # the manifest itself, which is written at the end
            write_text(output, "x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(output)
    assert not output.exists()


def test_a_manifest_of_others_runs_no_command(tmp_path: Path, shards: Path) -> None:
    index(shards, tmp_path / "m.json")
    document = json.loads((tmp_path / "m.json").read_text())
    document["shards"][1]["path"] = f"pipe:touch {tmp_path}/owned"
    (tmp_path / "m.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="must not run one"):
        run_manifest(tmp_path / "run.json", DataConfig(train=str(tmp_path / "m.json")))
    assert not (tmp_path / "owned").exists()


def test_a_run_knows_its_own_manifest_where_paths_are_relative(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    section = DataConfig(train=shards.name)
    made = run_manifest(tmp_path / "run" / "manifest.json", section)
    assert all(Path(shard.path).is_file() and Path(shard.path).is_absolute() for shard in made.shards)
    monkeypatch.setattr(Describe, "rows", lambda *_: pytest.fail("indexed again"))
    assert run_manifest(tmp_path / "run" / "manifest.json", section) == made


@pytest.mark.parametrize("name", ["nope.json", "set"])
def test_what_is_no_manifest_is_told_in_a_line(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["data", "check", str(tmp_path / name)]) == 1
    said = capsys.readouterr().err
    assert f"error: manifest {tmp_path / name}: cannot be read" in said
    assert "`neuclip data index` writes" in said


def test_a_folder_of_folders_is_told_what_it_holds(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(ShardError, match=r"the folder '.*' holds no \*\.tar; its folders: set\. Give the shards'"):
        expand_shards(str(tmp_path))


def test_bad_usage(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert main(["data", "index", str(shards), "--output", str(tmp_path / "m.txt")]) == 2
    assert "must end in .json or .parquet" in capsys.readouterr().err
    with pytest.raises(ManifestError, match="no such file"):
        run_manifest(tmp_path / "run.json", DataConfig(train=str(tmp_path / "absent.parquet")))
