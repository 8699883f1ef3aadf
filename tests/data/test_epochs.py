from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_loader, take
from hypothesis import given
from hypothesis import strategies as st

from neuclip_scale.data.epochs import EpochLedger, joined, whole_epoch
from neuclip_scale.data.manifest import Manifest


@given(st.integers(1, 300), st.integers(1, 5), st.randoms())
def test_ranks_together_prove_an_epoch_and_no_other_reading_passes(n: int, ranks: int, random: object) -> None:
    def read(indices: list[int]) -> tuple[int, int, int]:
        ledgers = [EpochLedger() for _ in range(ranks)]
        for place, index in enumerate(indices):
            ledgers[place % ranks].add(7, index)
        return joined(ledger.open for ledger in ledgers).get(7, (0, 0, 0))

    order = list(range(n))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert read(order) == whole_epoch(n)
    assert read(order[:-1]) != whole_epoch(n)
    assert read([*order, order[0]]) != whole_epoch(n)
    if n > 1:
        assert read([order[1], *order[1:]]) != whole_epoch(n)


def test_sums_of_thousands_of_millions_stay_exact() -> None:
    n = 12_800_000_000
    count, first, second = whole_epoch(n)
    assert count == n
    assert first == (n * (n - 1) // 2) % 2**64
    assert second == (n * (n - 1) * (2 * n - 1) // 6) % 2**64


def test_the_loader_tells_what_it_read(clean_manifest: Manifest) -> None:
    """45 pairs over batches of 12: the first epoch is whole once every stream is past it."""
    parts = [each.epochs for rank in (0, 1) for each in take(make_loader(clean_manifest, rank=rank, world_size=2), 5)]
    assert joined(parts)[0] == whole_epoch(45)
    assert joined(parts[:-1])[0] == whole_epoch(45)
    assert joined(parts[1:])[0] != whole_epoch(45)
    assert not any(each.epochs for each in take(make_loader(clean_manifest, replacement=True), 2))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_reports_each_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str], interrupted: bool) -> None:
    from neuclip_scale.config import load_recipe
    from neuclip_scale.data.synthetic import write_synthetic_shards
    from neuclip_scale.trainer import Trainer

    write_synthetic_shards(tmp_path / "shards", 45, 8, 24, seed=1)
    fields = {
        "run_dir": str(tmp_path / "run"), "data.train": str(tmp_path / "shards"), "data.num_workers": 0,
        "model.preset": "toy", "data.num_streams": 4, "data.shuffle_window": 7, "evaluation.data": "",
        "evaluation.normalizer_every_steps": 0, "train.global_batch_size": 12, "train.num_steps": 8,
        "objective.npn.num_prototypes": 8, "optim.warmup_steps": 1, "checkpoint.every_steps": 3,
    }  # fmt: skip
    if interrupted:
        trainer = Trainer(load_recipe("demo", fields))
        trainer.watch.finished = _stop_after_four(trainer)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    summary = Trainer(load_recipe("demo", fields)).fit()
    assert (summary["epochs_checked"], summary["epochs_wrong"]) == (2, 0)
    assert capsys.readouterr().out.count("each of the 45 samples was read once") == 2 + interrupted  # once more


def _stop_after_four(trainer: Any) -> Callable[[int], None]:
    def stop(step: int) -> None:
        if step == 4:
            trainer.run_state.finish_save()
            raise KeyboardInterrupt

    return stop
