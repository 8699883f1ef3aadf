"""Shards on a real web server and a real S3 server are the same data as in a folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_helpers import make_loader, take
from s3_server import s3_bucket
from web_server import Shelf, web_server

from neuclip_scale.cli import main
from neuclip_scale.config import DataConfig
from neuclip_scale.data.cache import ShardCache
from neuclip_scale.data.manifest import Manifest, ManifestError, build_manifest
from neuclip_scale.data.run_manifest import run_manifest
from neuclip_scale.data.shards import ShardError, expand_shards, storage
from neuclip_scale.data.synthetic import write_synthetic_shards

NUM_SHARDS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_synthetic_shards(path, 45, 12, 24, seed=1)
    return path


@pytest.fixture
def shelf(folder: Path) -> Iterator[Shelf]:
    with web_server(folder) as served:
        yield served


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("NEUCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def s3(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_bucket(folder, "pool/train", tmp_path_factory.mktemp("moto") / "log") as address:
        yield address


def batches(manifest: Manifest, **options: object) -> list[tuple[list[str], list[int]]]:
    loaded = take(make_loader(manifest, **options), 5)
    return [(list(each.batch.uids), each.batch.sample_index.tolist()) for each in loaded]


def manifest_of(address: str, tmp_path: Path) -> Manifest:
    return run_manifest(tmp_path / "manifest.json", DataConfig(train=address))


def test_http_gives_the_batches_of_the_folder(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    local = manifest_of(str(folder), tmp_path / "local")
    remote = manifest_of(f"{shelf.address}/{{00000..00003}}.tar", tmp_path / "remote")
    assert remote.fingerprint == local.fingerprint
    assert all(shard.version for shard in remote.shards)
    assert batches(remote) == batches(local)
    assert batches(remote, num_workers=2) == batches(local)


def test_s3_gives_the_batches_of_the_folder(s3: str, folder: Path, tmp_path: Path) -> None:
    local = manifest_of(str(folder), tmp_path / "local")
    for name in ("", "/*.tar", "/{00000..00003}.tar"):
        remote = manifest_of(s3.format(name=name), tmp_path / f"remote {len(name)}")
        assert remote.fingerprint == local.fingerprint
        assert len(remote.shards) == NUM_SHARDS
    assert batches(remote, num_workers=2) == batches(local)


def test_a_command_gives_the_batches_of_the_folder(folder: Path, tmp_path: Path) -> None:
    remote = manifest_of(f"pipe:cat {folder}/{{00000..00003}}.tar", tmp_path / "remote")
    assert batches(remote) == batches(manifest_of(str(folder), tmp_path / "local"))
    with pytest.raises(ManifestError, match=r"given up after .* status 1.*No such file"):
        manifest_of(f"pipe:cat {folder}/absent.tar", tmp_path / "absent")


def test_counts_beside_remote_shards_are_taken_over(shelf: Shelf, tmp_path: Path, folder: Path) -> None:
    for name in ("sizes.json", "00000_stats.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "sizes.json").write_text('{"00000.tar": 12, "00001.tar": 12, "00002.tar": 12}')
    (folder / "00003_stats.json").write_text('{"successes": 9}')
    try:
        manifest = manifest_of(f"{shelf.address}/{{00000..00003}}.tar", tmp_path / "remote")
    finally:
        (folder / "sizes.json").unlink()
        (folder / "00003_stats.json").unlink()
    assert [shard.num_samples for shard in manifest.shards] == [12, 12, 12, 9]
    assert not any(count for name, count in shelf.asked.items() if name.endswith(".tar"))


def test_a_broken_connection_goes_on_where_it_stopped(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    shelf.resets["00001.tar"] = 2
    shelf.failures["00002.tar"] = 2
    for name in ("00001.tar", "00002.tar"):
        storage.fetch(f"{shelf.address}/{name}", tmp_path / name)
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert shelf.resets["00001.tar"] == shelf.failures["00002.tar"] == 0


def test_a_shard_that_vanishes_is_counted_and_listed(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(f"{shelf.address}/{{00000..00003}}.tar", tmp_path / "remote")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    shelf.failures["00002.tar"] = 1_000_000
    loaded = take(make_loader(manifest, max_bad_fraction=1.0), 4)
    skipped = [sample for each in loaded for sample in each.skipped]
    assert skipped
    assert {sample.shard for sample in skipped} == {f"{shelf.address}/00002.tar"}
    assert all("given up after 6 attempt(s)" in sample.reason for sample in skipped)
    assert not any("00002/" in uid for each in loaded for uid in each.batch.uids)
    # its samples are refused at once afterwards, not after six attempts each
    assert shelf.failures["00002.tar"] > 1_000_000 - 100


def test_a_local_shard_that_vanishes_is_counted_and_listed(tmp_path: Path) -> None:
    write_synthetic_shards(tmp_path / "s", 45, 12, 24, seed=1)
    manifest = manifest_of(str(tmp_path / "s"), tmp_path / "run")
    (tmp_path / "s" / "00001.tar").unlink()
    loaded = take(make_loader(manifest, max_bad_fraction=1.0), 4)
    skipped = [sample for each in loaded for sample in each.skipped]
    assert {sample.shard for sample in skipped} == {str(tmp_path / "s" / "00001.tar")}
    assert all(sample.key.startswith("#") for sample in skipped)


def test_a_shard_that_changes_on_the_server_is_an_error(tmp_path: Path) -> None:
    write_synthetic_shards(tmp_path / "s", 24, 12, 24, seed=1)
    with web_server(tmp_path / "s") as shelf:
        manifest = manifest_of(f"{shelf.address}/{{00000..00001}}.tar", tmp_path / "run")
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
        write_synthetic_shards(tmp_path / "s", 30, 15, 24, seed=1)
        with pytest.raises(ManifestError, match="must not change"):
            take(make_loader(manifest), 1)


def test_the_cache_is_bounded_and_the_oldest_goes(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    sizes = [(folder / f"{number:05d}.tar").stat().st_size for number in range(NUM_SHARDS)]
    cache = ShardCache(tmp_path / "small", sizes[0] + sizes[1])
    addresses = [f"{shelf.address}/{number:05d}.tar" for number in range(NUM_SHARDS)]
    with open(cache.local(addresses[0], "a"), "rb") as opened:
        for number, address in enumerate([addresses[1], addresses[0], addresses[2]]):
            path = cache.local(address, "a")
            os.utime(path, (number, number))
        assert len(list((tmp_path / "small").iterdir())) == 2
        asked = shelf.asked["00000.tar"]
        cache.local(addresses[0], "a")
        assert shelf.asked["00000.tar"] == asked
        assert cache.local(addresses[0], "another version") != cache.local(addresses[0], "a")
        assert len(opened.read()) == sizes[0]


def test_a_shard_is_on_the_disk_before_it_has_its_name(
    shelf: Shelf, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (flush(file), done.append(os.fstat(file).st_ino))[0])

    def checked_rename(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in done
        rename(source, target)

    monkeypatch.setattr(os, "replace", checked_rename)
    name = sorted(folder.glob("*.tar"))[0].name
    fetched = ShardCache(tmp_path / "cache", 1 << 30).local(f"{shelf.address}/{name}", "a")
    assert Path(fetched).read_bytes() == (folder / name).read_bytes()


def test_what_others_keep_in_the_folder_of_the_cache_stays(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / ".ssh").mkdir(parents=True)
    (mine / "img2dataset-1.47").mkdir()
    for name in (".ssh/key", ".profile", "notes.tar", "img2dataset-1.47/python"):
        (mine / name).write_text("x" * 1000)
    gone = mine / f".{'0' * 32}.tar.1.2.tmp"
    gone.write_text("of a process that was killed")
    before = [path for path in sorted(mine.rglob("*")) if path != gone]
    for path in (*before, gone):
        os.utime(path, (1, 1))
    cache = ShardCache(mine, 1)
    kept = [Path(cache.local(f"pipe:cat {folder}/{number:05d}.tar", "")) for number in range(2)]
    assert sorted(mine.rglob("*")) == sorted([*before, kept[1]])


def test_a_shard_evicted_just_before_it_is_opened_is_fetched_again(
    shelf: Shelf, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(f"{shelf.address}/{{00000..00003}}.tar", tmp_path / "remote")
    local, evicted = ShardCache.local, list[str]()

    def another_process_makes_room(cache: ShardCache, address: str, version: str, **options: bool) -> str:
        path = local(cache, address, version, **options)
        if evicted.count(address) < 2:
            evicted.append(address)
            Path(path).unlink()
        return path

    expected = batches(manifest)
    monkeypatch.setattr(ShardCache, "local", another_process_makes_room)
    loaded = take(make_loader(manifest), 5)
    assert [list(each.batch.uids) for each in loaded] == [uids for uids, _ in expected]
    assert not any(each.skipped for each in loaded)
    assert len(evicted) == 2 * NUM_SHARDS


def test_check_asks_the_server_and_not_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic_shards(tmp_path / "s", 24, 12, 24, seed=1)
    with web_server(tmp_path / "s") as shelf:
        manifest = str(tmp_path / "m.json")
        assert (
            main(["data", "index", f"{shelf.address}/{{00000..00001}}.tar", "--output", manifest, "--read-tars"]) == 0
        )
        assert main(["data", "check", manifest]) == 0
        write_synthetic_shards(tmp_path / "s", 30, 15, 24, seed=1)
        assert main(["data", "check", manifest]) == 1
        assert "samples 15, the manifest says 12" in capsys.readouterr().out
        (tmp_path / "s" / "00001.tar").unlink()
        assert main(["data", "check", manifest]) == 1
        assert "00001.tar: cannot be read" in capsys.readouterr().out
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_command_is_run_again_when_its_shard_is_indexed_again(tmp_path: Path) -> None:
    write_synthetic_shards(tmp_path / "s", 12, 12, 24, seed=1)
    address = f"pipe:cat {tmp_path}/s/00000.tar"
    assert manifest_of(address, tmp_path / "a").num_samples == 12
    write_synthetic_shards(tmp_path / "s", 15, 15, 24, seed=1)
    manifest = manifest_of(address, tmp_path / "b")
    assert manifest.num_samples == 15
    assert take(make_loader(manifest), 1)


def test_shards_of_a_remote_manifest_are_asked_of_its_server(folder: Path, tmp_path: Path) -> None:
    """Relative to it, with the endpoint of its address."""
    build_manifest(sorted(map(str, folder.glob("*.tar")))).save(tmp_path / "local.json")
    document = json.loads((tmp_path / "local.json").read_bytes())
    for shard in document["shards"]:
        shard |= {"path": Path(shard["path"]).name, "mtime_ns": 0}
    (folder / "manifest.json").write_text(json.dumps(document))
    try:
        with s3_bucket(folder, "pool/train", tmp_path / "log") as address:
            manifest = manifest_of(address.format(name="/manifest.json"), tmp_path)
            assert "endpoint_override" in address
            assert {shard.path for shard in manifest.shards} == {
                address.format(name=f"/{number:05d}.tar") for number in range(NUM_SHARDS)
            }
            assert batches(manifest) == batches(manifest_of(str(folder), tmp_path / "local"))
    finally:
        (folder / "manifest.json").unlink()


def test_a_full_disk_is_said_at_once(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_copy", full)
    with pytest.raises(ShardError, match=r"after 1 attempt.*No space left"):
        storage.fetch(f"{shelf.address}/00000.tar", tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()


def test_a_cache_of_somebody_else_is_refused(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ShardError, match="belongs to another user"):
        ShardCache(tmp_path / "theirs", 1 << 30).local(f"{shelf.address}/00000.tar", "")


def test_what_is_not_there_is_named(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"/absent\.tar"):
        manifest_of(f"{shelf.address}/absent.tar", tmp_path)
    with pytest.raises(ShardError, match="xyz"):
        expand_shards("xyz://bucket/folder")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/data/00000.tar", "00000.tar"),
        ("/data/a?b/00000.tar", "00000.tar"),
        ("s3://bucket/x/00001.tar?region=eu", "00001.tar"),
        ("pipe:aws s3 cp s3://bucket/x/00002.tar -", "00002.tar"),
        ("pipe:curl -s 'https://h/00003.tar'", "00003.tar"),
        ("pipe:make-shard 7", "pipe:make-shard 7"),
    ],
)
def test_a_shard_has_its_name_wherever_it_lies(address: str, name: str) -> None:
    assert storage.base_name(address) == name
