"""From the lines of all ranks to the bad nodes."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TextIO

from neuclip_scale.preflight.reports import Report, from_line

LAST, NETWORK = "done", "network"
"""The report after which a rank has nothing more to say, and that of a collective that failed."""


@dataclass
class Verdict:
    """What is wrong with which node; a problem of no node in particular has the empty name."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    """By what was probed, what was found; for people."""

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes with a problem, in the order of their names."""
        return sorted(node for node in self.problems if node)

    def add(self, node: str, problem: str) -> None:
        """Note a problem once."""
        told = self.problems.setdefault(node, [])
        if problem not in told:
            told.append(problem)


def hear(stream: TextIO, num_ranks: int, seconds: float, other: TextIO) -> list[Report]:
    """Reports until all ranks are done, the stream ends, or `seconds` are over; other lines go to `other`."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="reports", daemon=True).start()
    reports: list[Report] = []
    deadline, num_done = time.monotonic() + seconds, 0
    while num_done < num_ranks:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if line is None:
            break
        report = from_line(line)
        if report is None:
            other.write(line)
            continue
        reports.append(report)
        num_done += report.name == LAST
    return reports


def judge(
    reports: Iterable[Report], nodes: list[str], ranks_per_node: int, floor: float, max_clock_offset: float
) -> Verdict:
    """Name the bad nodes among `nodes`, which are in the order of their ranks.

    `floor`: GB/s of the all-reduce; `max_clock_offset`: seconds.
    """
    reports, verdict = list(reports), Verdict()
    for report in reports:
        if report.problem and report.name != NETWORK:
            verdict.add(report.node, f"{report.name}: {report.problem}")
        if report.detail:
            verdict.details.setdefault(report.name, report.detail)
    _judge_presence(reports, nodes, ranks_per_node, verdict)
    _judge_versions(reports, nodes, verdict)
    _judge_storage(reports, nodes, verdict)
    _judge_absent(reports, nodes, ranks_per_node, verdict)
    _judge_network(reports, nodes, verdict)
    _judge_clock(reports, max_clock_offset, verdict)
    _judge_rates(reports, nodes, floor, verdict)
    return verdict


def _judge_presence(reports: list[Report], nodes: list[str], ranks_per_node: int, verdict: Verdict) -> None:
    """A rank that did not come to its end, where it is not told why."""
    last = {report.rank: report for report in reports}
    silent = [rank for rank in range(len(nodes) * ranks_per_node) if rank not in last]
    for rank in silent:
        verdict.add(nodes[rank // ranks_per_node], "no answer: it does not start, or hangs")
    if silent or verdict.bad_nodes:
        return  # the others may have waited for these
    ended = {report.rank for report in reports if report.name in (LAST, NETWORK)}
    for rank, report in last.items():
        if rank not in ended:
            node = "" if report.name == "join" else report.node
            verdict.add(node, f"no word after {report.name!r}: it hangs in what follows")


def _judge_versions(reports: list[Report], nodes: list[str], verdict: Verdict) -> None:
    found = {report.node: report.values for report in reports if report.name == "versions"}
    for name in sorted({name for values in found.values() for name in values}):
        held = {node: str(values.get(name, "none")) for node, values in found.items()}
        # Most nodes are right; of two halves, the one of the first node.
        ordered = [held[node] for node in nodes if node in held]
        usual = Counter(ordered).most_common(1)[0][0]
        for node, value in held.items():
            if value != usual:
                verdict.add(node, f"versions: {name} {value}, the other nodes have {usual}")


def _judge_storage(reports: list[Report], nodes: list[str], verdict: Verdict) -> None:
    """Fewest nodes that explain who does not see whose file: each time the one that most have trouble with."""
    troubles = {
        frozenset((report.node, nodes[number]))
        for report in reports
        if report.name == "storage"
        for number in report.values["missing"]
    }
    troubles = {pair for pair in troubles if not pair & verdict.problems.keys()}
    while troubles:
        counts = Counter(node for pair in troubles for node in pair)
        # Of two nodes either may be cut off; the first has the shell of the job.
        worst = max(counts, key=lambda node: (counts[node], nodes.index(node)))
        verdict.add(worst, "storage: it does not see the files of other nodes, or they do not see its own")
        troubles = {pair for pair in troubles if worst not in pair}


def _judge_absent(reports: list[Report], nodes: list[str], ranks_per_node: int, verdict: Verdict) -> None:
    for report in reports:
        for rank in report.values.get("absent", []):
            node = nodes[rank // ranks_per_node]
            if node not in verdict.problems:
                verdict.add(node, f"{NETWORK}: rank {rank} did not reach {nodes[0]}")


def _judge_network(reports: list[Report], nodes: list[str], verdict: Verdict) -> None:
    """A collective that fails fails on many ranks, and mostly because of one that has another trouble."""
    failed = {report.node: report.problem for report in reports if report.name == NETWORK}
    if verdict.problems or not failed:
        return
    for node, problem in failed.items():
        verdict.add(node if len(failed) * 2 < len(nodes) else "", f"{NETWORK}: {problem}")


def _judge_clock(reports: list[Report], limit: float, verdict: Verdict) -> None:
    offsets = {report.node: report.values["offset"] for report in reports if report.name == "clock"}
    off = {node: offset for node, offset in offsets.items() if abs(offset) > limit}
    if off and 2 * len(off) >= len(offsets):  # the median is one of the clocks, which may be the wrong one
        apart = max(offsets.values()) - min(offsets.values())
        remedy = f"which is right cannot be told: see the time services of {', '.join(offsets)}"
        verdict.add("", f"clock: {apart:.1f} s apart (limit {limit:g} s), and {remedy}")
        return
    for node, offset in off.items():
        verdict.add(node, f"clock: {offset:+.1f} s off the others (limit {limit:g} s): see its time service")


def _judge_rates(reports: list[Report], nodes: list[str], floor: float, verdict: Verdict) -> None:
    for report in reports:
        if report.name == "all-reduce in a node" and report.values["rate"] < floor:
            verdict.add(
                report.node, f"all-reduce among its own ranks: {report.values['rate']:.2f} GB/s, floor {floor:g}"
            )
    whole = [report.values["rate"] for report in reports if report.name == "all-reduce"]
    if not whole or min(whole) >= floor or verdict.bad_nodes:
        return
    told = f"all-reduce: {min(whole):.2f} GB/s over all ranks, floor {floor:g}"
    pairs = {
        tuple(map(int, key.split("-"))): rate for one in reports for key, rate in one.values.get("pairs", {}).items()
    }
    slow = {node: [rate for pair, rate in pairs.items() if node in pair] for node in range(len(nodes))}
    bad = [node for node, rates in slow.items() if rates and max(rates) < floor]
    for node in bad if len(bad) < len(nodes) else []:
        verdict.add(nodes[node], f"{told}; {max(slow[node]):.2f} GB/s at most between it and its neighbours")
    if not verdict.bad_nodes:
        verdict.add("", f"{told}, and no single node is the cause: set the floor lower, or see the network")
