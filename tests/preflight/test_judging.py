"""Which node is bad, by what all ranks have said."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import Any

import pytest

from neuclip_scale import cli
from neuclip_scale.preflight.judging import LAST, Verdict, hear, judge
from neuclip_scale.preflight.probes import memory_problems
from neuclip_scale.preflight.reports import Report, from_line, to_line

NODES = ["n1", "n2", "n3", "n4"]


def well(rank: int, ranks_per_node: int = 2) -> list[Report]:
    """What a rank of a good node says."""
    node = NODES[rank // ranks_per_node]
    said = [Report(rank, node, "hello")]
    if rank % ranks_per_node == 0:
        said += [
            Report(rank, node, "versions", values={"python": "3.11", "torch": "2.14"}),
            Report(rank, node, "storage", values={"missing": []}),
            Report(rank, node, "clock", values={"offset": 0.01}),
            Report(rank, node, "all-reduce", detail="9 GB/s", values={"rate": 9.0, "pairs": {}}),
        ]
    return [*said, Report(rank, node, LAST)]


def verdict_on(changed: dict[int, list[Report]], nodes: int = 4, floor: float = 5.0) -> Verdict:
    reports = [report for rank in range(2 * nodes) for report in changed.get(rank, well(rank))]
    return judge(reports, NODES[:nodes], 2, floor, 2.0)


def with_values(rank: int, name: str, **values: Any) -> list[Report]:
    return [Report(r.rank, r.node, name, values=values) if r.name == name else r for r in well(rank)]


def test_all_are_well() -> None:
    verdict = verdict_on({})
    assert (verdict.problems, verdict.bad_nodes) == ({}, [])
    assert verdict.details == {"all-reduce": "9 GB/s"}


@pytest.mark.parametrize(
    ("rank", "said", "told"),
    [
        (4, [], "no answer"),
        (5, [Report(5, "n3", "hello")], "no word after 'hello'"),
        (5, [Report(5, "n3", "GPU", "GPU 1: 3 of 80 GiB are free"), Report(5, "n3", LAST)], "GPU: GPU 1: 3 of 80 GiB"),
        (4, with_values(4, "versions", python="3.11", torch="2.13"), "torch 2.13, the other nodes have 2.14"),
        (4, with_values(4, "versions", python="3.11"), "torch none, the other nodes have 2.14"),
        (4, with_values(4, "versions", python="3.11", torch="2.14", triton="3"), "triton 3, the other nodes have none"),
        (4, with_values(4, "clock", offset=-2.5), "clock: -2.5 s off"),
        (0, [*well(0), Report(0, "n1", "join", values={"absent": [5]})], "network: rank 5 did not reach n1"),
    ],
)  # fmt: skip
def test_the_bad_node_is_named_with_the_reason(rank: int, said: list[Report], told: str) -> None:
    verdict = verdict_on({rank: said})
    assert verdict.bad_nodes == ["n3"]
    assert list(verdict.problems) == ["n3"]
    assert told in "; ".join(verdict.problems["n3"])


@pytest.mark.parametrize("clocks", [(0, 30), (30, 0), (30, 0, 0, 30), (0, 30, 60)])
def test_clocks_no_more_than_half_of_which_agree_are_no_nodes_fault(clocks: tuple[int, ...]) -> None:
    median = sorted(clocks)[len(clocks) // 2]
    said = {2 * node: with_values(2 * node, "clock", offset=clock - median) for node, clock in enumerate(clocks)}
    verdict = verdict_on(said, len(clocks))
    told = f"clock: {max(clocks)}.0 s apart (limit 2 s), and which is right cannot be told"
    assert list(verdict.problems) == [""]
    assert verdict.problems[""][0].startswith(told)


def test_a_dead_node_is_bad_and_not_those_that_wait_for_it() -> None:
    waiting = {rank: well(rank)[:-1] for rank in range(6)}
    verdict = verdict_on(waiting | {6: [], 7: []})
    assert verdict.bad_nodes == ["n4"]


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_storage_names_the_node_that_is_cut_off(nodes: int) -> None:
    last = nodes - 1
    missing = {2 * node: with_values(2 * node, "storage", missing=[last]) for node in range(last)}
    missing[2 * last] = with_values(2 * last, "storage", missing=list(range(last)))
    assert verdict_on(missing, nodes).bad_nodes == [NODES[last]]


def test_storage_a_node_that_cannot_write_is_the_only_bad_one() -> None:
    missing = {2 * node: with_values(2 * node, "storage", missing=[0]) for node in (1, 2, 3)}
    missing[0] = [Report(0, "n1", "storage", "cannot write", values={"missing": []}), *well(0)]
    verdict = verdict_on(missing)
    assert verdict.problems == {"n1": ["storage: cannot write"]}


def test_bandwidth_names_the_node_that_is_slow_to_all_its_neighbours() -> None:
    pairs = {0: {"0-1": 9.0, "3-0": 9.0}, 1: {"0-1": 9.0, "1-2": 1.0}, 2: {"1-2": 1.0, "2-3": 1.5}, 3: {"2-3": 1.5}}
    said = {2 * node: with_values(2 * node, "all-reduce", rate=1.0, pairs=pairs[node]) for node in range(4)}
    verdict = verdict_on(said)
    assert verdict.bad_nodes == ["n3"]
    assert "all-reduce: 1.00 GB/s over all ranks, floor 5; 1.50 GB/s at most" in verdict.problems["n3"][0]


def test_bandwidth_of_a_slow_network_is_no_nodes_fault() -> None:
    pairs = {"0-1": 1.0, "1-2": 1.0, "2-3": 1.0, "3-0": 1.0}
    said = {2 * node: with_values(2 * node, "all-reduce", rate=1.0, pairs=pairs) for node in range(4)}
    verdict = verdict_on(said)
    assert verdict.bad_nodes == []
    assert "no single node is the cause" in verdict.problems[""][0]


def test_a_node_whose_own_gpus_are_slow_to_each_other() -> None:
    said = {2: [*well(2), Report(2, "n2", "all-reduce in a node", values={"rate": 0.5})]}
    assert verdict_on(said).problems == {"n2": ["all-reduce among its own ranks: 0.50 GB/s, floor 5"]}


def test_a_collective_that_fails_everywhere_is_no_nodes_fault_but_on_few_it_is() -> None:
    failed = {rank: [*well(rank)[:-1], Report(rank, NODES[rank // 2], "network", "timed out")] for rank in range(8)}
    assert verdict_on(failed).problems == {"": ["network: timed out"]}
    assert verdict_on({6: failed[6]}).bad_nodes == ["n4"]


def test_lines_survive_labels_and_noise() -> None:
    report = Report(3, "n2", "GPU", 'says "no"\n', "détail", {"rate": 1.5})
    for line in (to_line(report), f" 3: {to_line(report)}\n", f"12: {to_line(report)}\n"):
        assert from_line(line) == report
    for line in ("srun: error\n", "3: PREFLIGHT {\n", 'PREFLIGHT {"rank": 1}\n', "", "3: PREFLIGHT []\n"):
        assert from_line(line) is None


def test_hearing_ends_with_the_last_rank_with_the_stream_and_with_the_time() -> None:
    lines = [to_line(report) + "\n" for rank in range(2) for report in well(rank)]
    other = io.StringIO()
    assert len(hear(io.StringIO("noise\n" + "".join(lines)), 2, 60, other)) == 8
    assert other.getvalue() == "noise\n"
    assert len(hear(io.StringIO(lines[0]), 2, 60, other)) == 1
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream, os.fdopen(writing, "w") as writer:
        print(lines[0], file=writer, flush=True, end="")
        began = time.monotonic()
        assert len(hear(stream, 2, 0.5, sys.stderr)) == 1
        assert 0.4 < time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("0, 0, No, No", ""),
        ("0, [N/A], [N/A], [N/A]", ""),
        ("3, 12, No, No", "GPU 3: uncorrected ECC errors since the driver was loaded (12)"),
        ("1, 0, Yes, No", "GPU 1: rows of its memory could not be remapped"),
        ("1, 0, 0, 1", "GPU 1: rows of its memory wait to be remapped: the GPU wants a reset"),
    ],
)
def test_memory_errors_in_nvidia_smis_table(row: str, told: str) -> None:
    assert memory_problems(f"7, 0, No, No\n{row}\n") == ([told] if told else [])


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--ranks-per-node", "0", "give 1 or more"),
        ("--ranks-per-node", "-8", "give 1 or more"),
        ("--seconds", "-1", "give 0 or a positive number"),
        ("--floor", "nan", "give 0 or a positive number"),
        ("--max-clock-offset", "inf", "give 0 or a positive number"),
    ],
)
def test_numbers_by_which_every_node_or_none_would_be_fit_are_refused(
    option: str, value: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)  # with which a judge ends
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        cli.main(["preflight", "judge", "--nodes", "n1", "n2", "--ranks-per-node", "8", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: {value}: {told}" in capsys.readouterr().err
