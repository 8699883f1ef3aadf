"""What a real training run saw, against walking its order sample by sample."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_helpers import settings as run_settings

from neuclip_scale.commands.audit import main
from neuclip_scale.commands.export import model_card
from neuclip_scale.config import load_recipe
from neuclip_scale.data.manifest import Manifest, ShardEntry
from neuclip_scale.data.mixing import MixedOrder, create_order
from neuclip_scale.data.required_audit import RequiredAudit, RequiredAuditError, required_audit
from neuclip_scale.data.streams import StreamOrder
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.trainer import Trainer


def manifest(sizes: list[int]) -> Manifest:
    starts = np.cumsum([0, *sizes])
    return Manifest(
        tuple(ShardEntry(f"{i}.tar", size, 1, 1, int(starts[i]), source=i % 2) for i, size in enumerate(sizes))
    )


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=6),
    positions=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    window=st.integers(1, 7),
    replacement=st.booleans(),
    mixed=st.booleans(),
)
def test_reads_are_counted_as_a_walk_meets_them(
    sizes: list[int], positions: tuple[int, int], window: int, replacement: bool, mixed: bool
) -> None:
    shards = manifest([size + 1 for size in sizes])
    options: dict[str, Any] = {"num_streams": 2, "shuffle_window": window, "seed": 3, "replacement": replacement}
    order: StreamOrder | MixedOrder = StreamOrder(shards, **options)
    if mixed:
        order = MixedOrder([StreamOrder(shards, source=source, **options) for source in (0, 1)], [1.0, 2.0], 3)
    expected = Counter(i for stream, stop in enumerate(positions) for i in islice(order.walk(stream), stop))
    times = np.zeros(shards.num_samples, dtype=np.int32)
    order.count_reads(positions, times)
    assert {index: count for index, count in enumerate(times.tolist()) if count} == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a list, a download of 40 pairs, one of them broken, and a run of a little over half an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    write_synthetic_shards(folder / "d", num_samples=40, samples_per_shard=14, image_size=40, seed=1)
    broken = bytearray((folder / "d/00001.tar").read_bytes())
    begin = broken.find(b"\xff\xd8")
    broken[begin : begin + 300] = bytes(300)
    (folder / "d/00001.tar").write_bytes(broken)
    keys = [f"{shard:05d}{place:04d}" for shard in range(3) for place in range(14)][:40]
    uids = [hashlib.md5(f"1/{key}".encode()).hexdigest() for key in keys]
    pq.write_table(pa.table({"uid": uids}), folder / "list.parquet")
    values = run_settings(folder / "d", folder / "run", **{"train.num_steps": 3, "data.max_bad_fraction": 0.5})
    Trainer(load_recipe("demo", values)).fit()
    shutil.rmtree(folder / "run/checkpoints", ignore_errors=True)
    return folder


def audit(folder: Path, *more: object) -> dict[str, Any]:
    arguments = ["--manifest", folder / "list.parquet", "--download", folder / "d", "--run", folder / "run"]
    main([*map(str, [*arguments, "--output", folder / "out", *more]), "-j", "1"])
    return dict(json.loads((folder / "out/audit.json").read_bytes()))


def test_what_a_run_saw(trained: Path) -> None:
    (run,) = audit(trained)["runs"]
    recipe, shards = load_recipe(trained / "run/config.yaml"), Manifest.load(trained / "run/manifest.json")
    order = create_order(shards, recipe.data, recipe.seed)
    positions = json.loads((trained / "run/summary.json").read_bytes())["stream_positions"]
    walked = [i for stream, stop in enumerate(positions) for i in islice(order.walk(stream), stop)]
    seen = Counter(index for index in walked if index != 14)  # the broken one, if it was met
    assert run["samples_seen"] == 24
    assert sum(seen.values()) == 24
    assert run["positions_are_exact"]
    assert (run["trained"], run["reads"], run["most_often"]) == (len(seen), 24, max(seen.values()))
    rows = pq.read_table(trained / "out/lists/untrained_run.parquet")
    assert len(rows) == run["untrained"] == 40 - len(seen)
    trained_uids = pq.read_table(trained / "out/lists/trained_run.parquet").to_pydict()
    assert sorted(trained_uids["times"]) == sorted(seen.values())
    assert not set(trained_uids["uid"]) & set(rows["uid"].to_pylist())


def test_without_a_summary_positions_follow_from_the_samples_seen(trained: Path) -> None:
    (trained / "run/summary.json").rename(trained / "summary.json")
    try:
        document = audit(trained)
        assert not document["runs"][0]["positions_are_exact"]
        assert any("skipped none" in note for note in document["notes"])
        assert 20 <= document["runs"][0]["trained"] <= 24
    finally:
        (trained / "summary.json").rename(trained / "run/summary.json")


def test_a_run_of_another_order_is_not_taken_for_the_one_before(trained: Path, tmp_path: Path) -> None:
    """Both saw as many samples of the same shards, and the cache of the first audit is there."""
    shutil.copytree(trained / "run", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    seed = load_recipe(config).seed
    config.write_text(config.read_text().replace(f"\nseed: {seed}\n", f"\nseed: {seed + 1}\n"))
    assert load_recipe(config).seed == seed + 1
    arguments = ["--manifest", trained / "list.parquet", "--download", trained / "d", "--output", tmp_path / "out"]
    seen = []
    for run in (trained, tmp_path):
        main([*map(str, [*arguments, "--run", run / "run"]), "-j", "1"])
        seen.append(pq.read_table(tmp_path / "out/lists/trained_run.parquet")["uid"].to_pylist())
    assert seen[0] != seen[1]


def test_a_run_on_other_data_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic_shards(tmp_path / "d", num_samples=9, samples_per_shard=9, image_size=40, seed=1)
    arguments = ["--manifest", trained / "list.parquet", "--download", tmp_path / "d", "--run", trained / "run"]
    assert main([*map(str, arguments), "--output", str(tmp_path / "out"), "-j", "1"]) == 2
    assert "no download has its 3 shards" in capsys.readouterr().err


def test_of_downloads_that_look_alike_the_one_with_the_runs_own_tars_is_its(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "d", tmp_path / "copy")
    arguments = ["--manifest", trained / "list.parquet", "--download", tmp_path / "copy", "--download", trained / "d"]
    main([*map(str, arguments), "--run", str(trained / "run"), "--output", str(tmp_path / "out"), "-j", "1"])
    document = json.loads((tmp_path / "out/audit.json").read_bytes())
    assert document["runs"][0]["download"] == "d"


def test_training_can_require_an_audit(trained: Path, tmp_path: Path) -> None:
    good = [
        "--manifest",
        trained / "list.parquet",
        "--download",
        trained / "d",
        "--output",
        tmp_path / "good",
        "-j",
        "1",
    ]
    assert main(list(map(str, good))) == 0
    path = tmp_path / "good/audit.json"
    fingerprint = Manifest.load(trained / "run/manifest.json").fingerprint
    digest = json.loads(path.read_bytes())["digest"]
    assert required_audit(path, fingerprint) == RequiredAudit(digest, "d")

    values = run_settings(trained / "d", tmp_path / "run", **{"train.num_steps": 1, "data.require_audit": str(path)})
    values["data.max_bad_fraction"] = 0.5
    assert Trainer(load_recipe("demo", values)).fit()["audit"] == {"digest": digest, "download": "d"}
    card = model_card(tmp_path / "run", load_recipe(tmp_path / "run/config.yaml"), "safetensors")
    assert f"passed `neuclip audit` (download d, digest {digest})" in card

    with pytest.raises(RequiredAuditError, match="is of other shards"):
        required_audit(path, "0" * 32)
    strict = ["--manifest", trained / "list.parquet", "--download", trained / "d", "--deep", "-j", "1"]
    assert main(list(map(str, [*strict, "--output", tmp_path / "bad"]))) == 1
    values |= {"data.require_audit": str(tmp_path / "bad/audit.json"), "run_dir": str(tmp_path / "other")}
    with pytest.raises(RequiredAuditError, match=r"found discrepancies \(1 sample is there but cannot be used"):
        Trainer(load_recipe("demo", values))
    path.write_text(path.read_text().replace('"missing": 0', '"missing": 1', 1))
    with pytest.raises(RequiredAuditError, match="was changed after the audit"):
        required_audit(path, fingerprint)
    path.write_text("[]")
    with pytest.raises(RequiredAuditError, match=r"no audit\.json"):
        required_audit(path, fingerprint)
