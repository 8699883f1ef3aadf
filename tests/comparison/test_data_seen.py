"""Fingerprints, counts, and the step at which batch digests part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparison_helpers import write_run

from neuclip_scale.comparison import compare_runs, read_runs
from neuclip_scale.comparison.data_seen import DataSeen, data_seen
from neuclip_scale.comparison.sections import conclusion


def seen(folder: Path, *changes: dict[str, Any]) -> DataSeen:
    return data_seen(read_runs([write_run(folder / str(number), **change) for number, change in enumerate(changes)]))


def test_the_same_batches(tmp_path: Path) -> None:
    data = seen(tmp_path, {}, {"objective__name": "openclip"})
    (order,) = data.orders
    assert order.text == "0, 1 (seed 0, global batch 8): the same batches for steps 1..4."
    assert (data.discrepancies, data.notes) == ([], [])


def test_digests_part_at_a_known_step(tmp_path: Path) -> None:
    data = seen(tmp_path, {"steps": 9}, {"steps": 9, "digests": {6: "other", 7: "7"}}, {"steps": 9})
    (order,) = data.orders
    assert order.parts_at == 6
    assert order.digests == {"0": "0-6", "1": "other", "2": "0-6"}
    expected = "the same batches until step 5, other samples or another order from step 6 on (0 0-6, 1 other, 2 0-6)."
    assert data.discrepancies == [f"0, 1, 2 (seed 0, global batch 8): {expected}"]


def test_digests_that_part_at_once(tmp_path: Path) -> None:
    (text,) = seen(tmp_path, {}, {"digests": {1: "other"}}).discrepancies
    assert text.startswith("0, 1 (seed 0, global batch 8): other samples or another order from step 1 on")


def test_a_short_run_does_not_hide_where_longer_ones_part(tmp_path: Path) -> None:
    longer = {"steps": 9, "train__num_steps": 9}
    (order,) = seen(tmp_path, {"steps": 3, "train__num_steps": 9}, longer, {**longer, "digests": {8: "x"}}).orders
    assert (order.parts_at, order.last_step, order.num_compared) == (8, 9, 9)


def test_other_seeds_have_other_orders_by_design(tmp_path: Path) -> None:
    data = seen(tmp_path, {}, {"seed": 1})
    assert (data.orders, data.discrepancies) == ([], [])
    assert data.notes == ["Seeds differ, so orders differ by design: between seeds only the fingerprint is checked."]


def test_other_batch_sizes_are_not_compared(tmp_path: Path) -> None:
    data = seen(tmp_path, {}, {"train__global_batch_size": 16})
    assert data.orders == []
    assert any("Global batch sizes differ" in note for note in data.notes)


def test_other_data(tmp_path: Path) -> None:
    (text,) = seen(tmp_path, {}, {"num_bytes": 2000, "seed": 1}).discrepancies
    assert text.startswith("Training data differ (fingerprints of the shards): 0 ")


def test_a_run_that_saw_less(tmp_path: Path) -> None:
    data = seen(tmp_path, {"steps": 8}, {"steps": 5, "train__num_steps": 8, "summary": {"status": "stopped"}})
    assert data.discrepancies == ["Numbers of samples seen differ: 0 64, 1 40."]


def test_skipped_samples_are_counted_and_noted(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", summary={"samples_skipped": 3})]
    (runs[1] / "skipped").mkdir()
    (runs[1] / "skipped" / "rank_00000.jsonl").write_text("{}\n{}\n{}\n")
    data = data_seen(read_runs(runs))
    assert [(row.samples_skipped, row.listed_skips) for row in data.runs] == [(0, 0), (3, 3)]
    assert data.discrepancies == []
    assert "Different numbers of samples were skipped" in data.notes[0]


def test_a_run_without_digests_proves_nothing(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "abc"]
    (runs[2] / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (order,) = data_seen(read_runs(runs)).orders
    assert (order.labels, order.without) == (("a", "b"), ("c",))
    assert order.text.endswith("the same batches for steps 1..4. No digests, so no proof: c.")
    (alone,) = data_seen(read_runs(runs[1:])).orders
    assert "the order is not proven" in alone.text


def test_other_captions_under_the_same_uids(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", contents={3: "recaptioned", 4: "recaptioned"})]
    seen = data_seen(read_runs(runs))
    (text,) = seen.discrepancies
    other = "other pictures or captions under the same uids from step 3 on"
    assert text == f"a, b (seed 0, global batch 8): the same uids for steps 1..4, but {other}."


def test_where_contents_were_not_recorded_it_says_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", contents=dict.fromkeys(range(1, 5)))]
    seen = data_seen(read_runs(runs))
    assert not seen.discrepancies
    assert "the same batches for steps 1..4 by their uids; not every run recorded what it read." in seen.orders[0].text


def test_contents_of_other_samples_are_no_news(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", digests={2: "x"}, contents={2: "y", 3: "z"})]
    (order,) = data_seen(read_runs(runs)).orders
    assert (order.parts_at, order.contents_part_at) == (2, None)


def test_the_conclusion_claims_no_more_than_was_recorded(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", contents=dict.fromkeys(range(1, 5)))]
    comparison = compare_runs(read_runs(runs))
    assert comparison.comparable
    assert not comparison.is_sure
    nothing = "Nothing that is recorded stands against comparing these runs, and their code is the same."
    assert (
        conclusion(comparison) == f"{nothing} Not every run recorded what it read under the same uids: see Data seen."
    )
    assert compare_runs(read_runs([runs[0], write_run(tmp_path / "c")])).is_sure
