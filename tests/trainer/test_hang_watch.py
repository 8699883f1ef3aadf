"""A rank that is stuck, asleep or stopped ends the run, with its stacks and its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from trainer_helpers import settings, start_ranks, wait_for_steps

from neuclip_scale.config import load_recipe
from neuclip_scale.heartbeat import Beat, read_beat, silent_ranks, write_beat
from neuclip_scale.telemetry.hang_watch import EXIT_HUNG, find_suspects

OPTIONS: dict[str, Any] = {"model.preset": "toy", "train.num_steps": 400, "train.hang_timeout_seconds": 3.0}


def fit(values: dict[str, Any], stuck: int) -> int:
    """Train; rank `stuck` falls asleep in its third step."""
    from neuclip_scale.trainer import Trainer

    class Sleeper(Trainer):
        def train_step(self, *arguments: Any) -> Any:
            if self.rank == stuck and self.run_state.launched == 2:
                time.sleep(600)
            return super().train_step(*arguments)

    Sleeper(load_recipe("demo", values)).fit()
    return 0


def test_a_rank_that_sleeps_is_named_and_shows_where(shards: Path, runs: Path) -> None:
    values = settings(shards, runs / "run", **OPTIONS)
    ranks = start_ranks(2, fit, (values, 1), runs / "output")
    assert [rank.wait() for rank in ranks] == [EXIT_HUNG, EXIT_HUNG]
    waiting, stuck = ((runs / f"run/stacks/rank_0000{rank}.txt").read_text() for rank in (0, 1))
    assert "time.sleep" not in waiting
    assert "in train_step" in stuck
    assert f'File "{__file__}", line' in stuck
    for text in (waiting, stuck):
        assert "no step for" in text
        assert "suspect: rank 1 on" in text
        assert "suspect: rank 0" not in text
    assert "train.hang_timeout_seconds=3" in ranks[0].text()
    beat = read_beat(runs / "run", 1)
    assert beat is not None
    assert (beat.state, beat.step, beat.launched) == ("hung", 1, 2)
    assert "after step 1, in encode, place" in waiting
    assert "of step 3" in waiting


def test_a_rank_that_is_stopped_is_named_by_the_others(shards: Path, runs: Path) -> None:
    """SIGSTOP: the thread that would tell is stopped with it."""
    first, second = start_ranks(2, fit, (settings(shards, runs / "run", **OPTIONS), -1), runs / "output")
    with second:
        wait_for_steps(runs / "run", 3, first.is_alive)
        os.kill(second.pid, signal.SIGSTOP)
        assert first.wait() == EXIT_HUNG
        text = (runs / "run/stacks/rank_00000.txt").read_text()
        assert "suspect: rank 1 on" in text
        assert "state T (stopped)" in text
        assert "suspect: rank 0" not in text
        assert not (runs / "run/stacks/rank_00001.txt").exists()


def test_where_stacks_cannot_be_written_they_are_printed(runs: Path) -> None:
    """As on a full disk: the rank must not end without a word."""
    (runs / "stacks").write_text("no folder")
    code = "import sys, time; from pathlib import Path; from neuclip_scale.telemetry.hang_watch import HangWatch\n"
    code += "with HangWatch(Path(sys.argv[1]), 0, 1, 0.2, {}).running(0):\n    time.sleep(60)\n"
    done = subprocess.run([sys.executable, "-c", code, str(runs)], capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_HUNG
    assert "error: rank 0 on" in done.stderr
    assert f"Stacks: above ({runs}/stacks/rank_00000.txt: File exists)" in done.stderr
    assert 'File "<string>", line 3' in done.stderr


def test_steps_that_come_and_pauses_are_no_hang(shards: Path, runs: Path) -> None:
    """Beats tell of every step, and of the end."""
    options = OPTIONS | {"train.num_steps": 3, "train.hang_timeout_seconds": 0.0}
    ranks = start_ranks(2, fit, (settings(shards, runs / "run", **options), -1), runs / "output")
    assert [rank.wait() for rank in ranks] == [0, 0]
    for rank in (0, 1):
        beat = read_beat(runs / "run", rank)
        assert beat is not None
        assert (beat.state, beat.step, beat.rank, beat.error) == ("ended", 3, rank, "")
    facts = json.loads((runs / "run/heartbeats/rank_00000.json").read_text())["facts"]
    assert (facts["num_steps"], facts["world_size"], facts["global_batch_size"]) == (3, 2, 8)


def fit_measuring_slowly(values: dict[str, Any]) -> int:
    """Train; the second measurement of the normalizers takes longer than a step may."""
    from neuclip_scale.evaluation.reference_pairs import ReferencePairs
    from neuclip_scale.trainer import Trainer

    encode, seconds = ReferencePairs.encode, iter((0.0, 2 * OPTIONS["train.hang_timeout_seconds"]))

    def slowly(reference: Any, engine: Any) -> Any:
        time.sleep(next(seconds))
        return encode(reference, engine)

    ReferencePairs.encode = slowly  # type: ignore[method-assign]
    Trainer(load_recipe("demo", values)).fit()
    return 0


def test_measuring_the_normalizers_is_no_hang(shards: Path, runs: Path) -> None:
    """Over all training pairs, as it is unless told otherwise, it takes what encoding them takes."""
    options = OPTIONS | {"train.num_steps": 3, "evaluation.normalizer_every_steps": 2}
    (rank,) = start_ranks(1, fit_measuring_slowly, (settings(shards, runs / "run", **options),), runs / "output")
    assert rank.wait() == 0, rank.text()


def some_beat(rank: int, age: float = 0.0, **fields: Any) -> Beat:
    given = {"time": time.time() - age, "rank": rank, "host": "n1", "pid": 1, "step": 7, "step_seconds": 9.0}
    return Beat(**{**given, "launched": 8, "section": "encode", "place": 5, **fields})


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"step": 6}, "after step 6"),
        ({"section": "data", "place": 1}, "in data, place 1"),
        ({"launched": 7, "section": "", "place": 0}, "after step 7, between two steps"),
        ({"launched": 8, "section": "", "place": 0}, "after step 7, waiting for the numbers of step 8"),
        ({"launched": 7, "place": 9}, "in encode, place 9 of step 8"),
        ({"age": 100.0}, "silent for 1"),
    ],
)
def test_the_suspect_is_the_one_that_differs(tmp_path: Path, odd: dict[str, Any], told: str) -> None:
    for rank in range(4):
        write_beat(tmp_path, some_beat(rank, **(odd if rank == 2 else {})))
    (line,) = find_suspects(tmp_path, 4, 30)
    assert line.startswith("suspect: rank 2 on n1 (pid 1)")
    assert told in line


def test_where_none_stands_out_all_are_told(tmp_path: Path) -> None:
    for rank in range(3):
        write_beat(tmp_path, some_beat(rank))
    place = "after step 7, in encode, place 5 of step 9"
    assert find_suspects(tmp_path, 3, 30) == [f"rank {rank} on n1: {place}" for rank in range(3)]
    assert find_suspects(tmp_path, 4, 30) == ["suspect: rank 3: it has never beaten"]


def test_silence_is_told_after_a_minute(tmp_path: Path) -> None:
    write_beat(tmp_path, some_beat(0))
    write_beat(tmp_path, some_beat(1, age=61))
    write_beat(tmp_path, some_beat(2, age=61, state="ended"))
    told = silent_ranks(tmp_path, 4)
    assert [line.split()[1] for line in told] == ["1", "3"]
