"""`neuclip preflight probe` on every rank of a job, `neuclip preflight judge` on the node that started them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from neuclip_scale.commands.numbers import amount, positive
from neuclip_scale.files import write_json


def main(argv: list[str]) -> int:
    """Run the command; 0 all nodes are fit, 1 one is not, 2 bad usage."""
    parser = argparse.ArgumentParser(
        "neuclip preflight",
        description="Are all nodes of a job fit to train?",
        epilog="srun ... neuclip preflight probe ... | neuclip preflight judge ...  Exit status: 0, 1 for a bad node, "
        "2 bad usage.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="probe|judge")
    probe = commands.add_parser("probe", help="on every rank: try everything and print what is found")
    probe.add_argument("--folder", type=Path, required=True, help="a new folder on the storage that all nodes share")
    probe.add_argument("--data", default="", help="what data.train will be; empty: the data are not looked at")
    probe.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    probe.add_argument("--floor", type=amount, default=0.0, help="GB/s of the all-reduce; below, nodes are compared")
    probe.add_argument("--patience", type=amount, default=30.0, help="seconds to wait for other nodes")
    judging = commands.add_parser("judge", help="read the ranks' lines; prints the bad nodes, joined by commas")
    judging.add_argument("--nodes", nargs="+", required=True, help="all nodes, in the order of their ranks")
    for each in (probe, judging):
        each.add_argument("--ranks-per-node", type=positive, required=True)
    judging.add_argument("--floor", type=amount, default=0.0, help="GB/s (bus bandwidth) that an all-reduce must reach")
    judging.add_argument("--max-clock-offset", type=amount, default=2.0, help="seconds")
    judging.add_argument("--seconds", type=amount, default=110.0, help="until who has not answered is bad")
    judging.add_argument("--json", metavar="PATH", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(argv)
    if arguments.command == "judge":
        return _judge(arguments)
    from neuclip_scale.preflight.probing import probe_all

    probe_all(
        arguments.folder,
        arguments.data,
        arguments.device,
        arguments.ranks_per_node,
        arguments.floor,
        arguments.patience,
    )
    sys.stdout.flush()
    os._exit(0)  # threads of a process group that waits for a dead node would keep this process


def _judge(arguments: argparse.Namespace) -> int:
    from neuclip_scale.preflight.judging import hear, judge

    num_ranks = len(arguments.nodes) * arguments.ranks_per_node
    reports = hear(sys.stdin, num_ranks, arguments.seconds, sys.stderr)
    verdict = judge(reports, arguments.nodes, arguments.ranks_per_node, arguments.floor, arguments.max_clock_offset)
    for name, detail in verdict.details.items():
        print(f"preflight: {name}: {detail}", file=sys.stderr)
    for node, problems in sorted(verdict.problems.items()):
        for problem in problems:
            print(f"preflight: BAD {f'node {node}: ' if node else ''}{problem}", file=sys.stderr)
    if not verdict.problems:
        print(f"preflight: {len(arguments.nodes)} node(s) are fit", file=sys.stderr)
    print(",".join(verdict.bad_nodes))
    if arguments.json:
        document = {"ok": not verdict.problems, "problems": verdict.problems, "found": verdict.details}
        write_json(arguments.json, document)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if verdict.problems else 0)  # its reader may still wait for a line of a rank that hangs
