"""The empirical check: arms against sets, the comparison by hand, and a real check that trains and goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_worlds import Shard, write_download
from evaluation_helpers import held_out
from hypothesis import given
from hypothesis import strategies as st

from neuclip_scale.audit.downloads import find_download
from neuclip_scale.audit.empirical import EmpiricalCheck, join_pools, run_check
from neuclip_scale.audit.empirical_arms import Arms, EmpiricalError, plan_arms
from neuclip_scale.audit.empirical_summary import prediction_limits, summarise
from neuclip_scale.audit.request import EmpiricalOptions
from neuclip_scale.commands.audit import main
from neuclip_scale.data.manifest import build_manifest
from neuclip_scale.data.synthetic import write_synthetic_shards
from neuclip_scale.files import json_ready

UIDS = np.dtype("u8,u8")
numbers = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)), min_size=1, max_size=30)


def array(values: set[tuple[int, int]]) -> np.ndarray:
    return np.array(list(values), dtype=UIDS)


def pairs(arms: Arms, arm: str) -> set[tuple[int, int]]:
    return {(int(high), int(low)) for high, low in arms.uids(arm).tolist()}


@given(numbers, numbers, numbers, st.integers(1, 3))
def test_arms_are_sets(shared: set, one: set, other: set, drops: int) -> None:
    first, second = shared | one, shared | other
    arms = plan_arms(array(first), array(second), None, drops)
    expected = {"first": first, "second": second, "common": first & second}
    for role, values in expected.items():
        assert pairs(arms, arms.arm_of[role]) == values
        assert len(arms.drops_of[role]) == drops
        for name in arms.drops_of[role]:
            assert len(pairs(arms, name)) == len(values) == len(arms.rows[name])
            assert pairs(arms, name) <= first | second
        if values == first | second:
            assert set(arms.drops_of[role]) == {arms.arm_of[role]}, "nothing can be dropped at random"
    assert len({frozenset(expected[role]) for role in expected}) == len(set(arms.arm_of.values()))
    again = plan_arms(array(first), array(second), None, drops)
    assert all(np.array_equal(arms.rows[name], again.rows[name]) for name in arms.rows)


def test_a_smaller_check_keeps_the_lists_within_what_is_drawn() -> None:
    first, second = {(0, i) for i in range(80)}, {(0, i) for i in range(20, 100)}
    arms = plan_arms(array(first), array(second), None, 2, max_pairs=50)
    assert len(arms.union) == 50
    drawn = {(int(high), int(low)) for high, low in arms.union.tolist()}
    assert pairs(arms, "first") == first & drawn
    assert pairs(arms, "common") == first & second & drawn
    assert len({arms.rows[name].tobytes() for name in ("first-drop1", "first-drop2", "first")}) == 3


def test_lists_that_give_no_arm_are_refused() -> None:
    with pytest.raises(EmpiricalError, match="common: holds no pair of 2"):
        plan_arms(array({(0, 1)}), array({(0, 2)}), None, 1)
    with pytest.raises(EmpiricalError, match="common: 1 of its pairs are not in both"):
        plan_arms(array({(0, 1), (0, 3)}), array({(0, 2), (0, 3)}), array({(0, 1), (0, 3)}), 1)


def test_the_comparison_by_hand() -> None:
    scores = {
        "first": [10.0, 12.0, 14.0], "second": [9.0, 9.0, 12.0], "common": [9.0, 9.0, 9.0],
        "a1": [10.0, 10.0, 10.0], "a2": [11.0, 11.0, 11.0], "b1": [10.0, 10.0, 10.0], "b2": [10.0, 10.0, 10.0],
    }  # fmt: skip
    arm_of = {"first": "first", "second": "second", "common": "common"}
    drops = {"first": ("a1", "a2"), "second": ("b1", "b2"), "common": ("b1", "b2")}
    found = summarise(scores, dict.fromkeys(scores, 5), arm_of, drops, "toy")
    assert found.difference.mean == pytest.approx(2.0)
    assert found.of_drops.mean == pytest.approx(0.5)
    # Two drops, 0 and 1: t(1) = 12.7062, s = 0.7071, sqrt(1 + 1/2).
    assert found.drop_limits == pytest.approx((0.5 - 11.0039, 0.5 + 11.0039), abs=1e-3)
    assert found.common_against_drops == pytest.approx(-1.0)
    assert "differ no more than random drops do" in found.sentence
    assert "12.00 and the second 10.00 points, +2.00 over 3 seed(s)" in found.sentence
    assert prediction_limits([1.0]) is None
    scores |= {"a2": [10.0, 10.0, 10.0]}
    assert "differ more than" in summarise(scores, dict.fromkeys(scores, 5), arm_of, drops, "toy").sentence
    with pytest.raises(ValueError, match="seeds"):
        summarise({**scores, "a1": [1.0]}, dict.fromkeys(scores, 5), arm_of, drops, "toy")


@pytest.mark.slow
def test_the_pool_links_to_every_shard_of_the_downloads_and_to_no_other(tmp_path: Path) -> None:
    for name in "abc":
        write_download(tmp_path / name, [Shard([(1, None)], [(1, None)])])
    build_manifest([str(tmp_path / name / "00000.tar") for name in "ab"]).save(tmp_path / "both.json")
    tars = []
    for download in (f"x={tmp_path}/both.json", f"x={tmp_path}/c"):
        pool = join_pools([find_download(download)], tmp_path / "pool")
        tars.append({str(tar.resolve().relative_to(tmp_path)) for tar in pool.glob("*.tar")})
    assert tars == [{"a/00000.tar", "b/00000.tar"}, {"c/00000.tar"}]


def test_an_audit_trains_compares_and_keeps_what_is_finished(tmp_path: Path) -> None:
    pool, part, output = tmp_path / "whole", tmp_path / "part", tmp_path / "out"
    write_synthetic_shards(pool, num_samples=40, samples_per_shard=20, image_size=40, seed=1)
    part.mkdir()
    shutil.copy(pool / "00000.tar", part)
    keys = [f"{shard:05d}{place:04d}" for shard in range(2) for place in range(20)]
    uids = [hashlib.md5(f"1/{key}".encode()).hexdigest() for key in keys]  # as write_synthetic_shards names them
    pq.write_table(pa.table({"uid": uids}), tmp_path / "list.parquet")
    values = {
        "evaluation.data": json.dumps(str(held_out(tmp_path))), "evaluation.normalizer_every_steps": 0,
        "train.num_steps": 2, "train.global_batch_size": 8, "data.num_workers": 0, "checkpoint.every_steps": 0,
        "engine.device": "cpu",
    }  # fmt: skip
    overrides = tuple(f"{key}={value}" for key, value in values.items())
    arguments = ["--manifest", tmp_path / "list.parquet", "--download", pool, "--download", part, "--output", output]
    arguments += ["--first-scores", "30", "31", "--second-scores", "28", "28.5", "-j", "1", "--empirical"]
    arguments += ["--empirical.seeds", "0", "--empirical.drops", "1"]
    arguments += [f"--empirical.set={each}" for each in overrides]
    assert main(list(map(str, arguments))) == 1
    document = json.loads((output / "audit.json").read_bytes())
    assert document["effect"]["gain"] == pytest.approx(2.25)
    found = document["empirical"]
    scores = {arm["name"]: arm["scores"] for arm in found["arms"]}
    assert {arm["name"]: arm["num_pairs"] for arm in found["arms"]} == {"first": 40, "second": 20, "second-drop1": 20}
    assert found["arm_of"]["common"] == "second", "one download holds the other, so they share the smaller one"
    assert all(0 <= score <= 100 for values in scores.values() for score in values)
    assert found["difference"]["mean"] == pytest.approx(scores["first"][0] - scores["second"][0])
    assert "16 samples seen" in found["sentence"]
    assert found["sentence"] in (output / "audit.html").read_text().replace("&#39;", "'")

    (tmp_path / "first.txt").write_text("\n".join(uids))
    check = EmpiricalCheck(
        output=output / "empirical", pool=pool, first=tmp_path / "first.txt", second=output / "lists/part/usable.npy",
        options=EmpiricalOptions(seeds=(0,), drops=1, set=overrides),
    )  # fmt: skip
    told: list[str] = []
    assert json_ready(run_check(replace(check, pool=output / "empirical/pool"), told.append).document()) == found
    assert sum("kept from before" in text for text in told) == 3
    (tmp_path / "first.txt").write_text("\n".join([*uids, "0" * 32]))
    with pytest.raises(EmpiricalError, match="holds other pairs than asked now"):
        run_check(check, told.append)
    with pytest.raises(EmpiricalError, match="lacks 1 of the 41 pairs of first"):
        run_check(replace(check, output=tmp_path / "other"), told.append)


def test_a_check_without_scores_or_drops_is_refused_before_it_trains(tmp_path: Path) -> None:
    check = EmpiricalCheck(output=tmp_path, pool=tmp_path, first=tmp_path / "a", second=tmp_path / "b")
    with pytest.raises(EmpiricalError, match=r"evaluation\.data"):
        run_check(replace(check, options=EmpiricalOptions(set=("evaluation.data=",))), print)
    with pytest.raises(EmpiricalError, match="drops = 0"):
        run_check(replace(check, options=EmpiricalOptions(drops=0)), print)
    (tmp_path / "a").write_text("http://no.uid/\n")
    with pytest.raises(EmpiricalError, match="is no 32 hexadecimal digits"):
        run_check(replace(check, second=tmp_path / "a", options=EmpiricalOptions(set=("evaluation.data=/x",))), print)
