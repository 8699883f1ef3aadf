"""`neuclip compare` on whole, broken and hostile run folders: exit status, console, JSON and page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import evaluation, write_run

from neuclip_scale import cli

HOSTILE = "<script>alert(1)<!--$x_{$ [bold]\x1b[31m\u202e"
FILES = ("config.yaml", "environment.json", "manifest.json", "metrics.jsonl", "summary.json")


class Page(HTMLParser):
    """Tags, and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def compare(*runs: Path, output: Path) -> int:
    return cli.main(["compare", *map(str, runs), "--output", str(output)])


def test_comparable_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path / f"{name}-{seed}", seed=seed, objective__name=name, scores=evaluation(0.3 + 0.1 * seed))
        for name in ("openclip", "neuclip")
        for seed in (0, 1)
    ]
    json_path = tmp_path / "more" / "result.json"
    argv = ["compare", *map(str, runs), "--output", str(tmp_path / "out"), "--json", str(json_path)]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Recipes differ in the method and the seed only.\n")
    for text in ("the same batches for steps 1..4", "neuclip minus openclip, paired by seed", "not recorded"):
        assert text in printed
    document = json.loads(json_path.read_text("utf-8"))
    assert document == json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert (document["comparable"], document["findings"]) == (True, [])
    assert [arm["name"] for arm in document["arms"]] == ["openclip", "neuclip"]
    assert document["cost"]["openclip-0"]["peak memory, GiB"] == pytest.approx(1.0)
    assert document["curves"][0]["loss"]["seconds"] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("git", "is_known"),
    [
        ({"commit": "a" * 40, "dirty": False}, True),
        ({"commit": "a" * 40, "dirty": True}, False),
        ({"commit": "a" * 40, "dirty": None}, False),
        (None, False),
    ],
    ids=["a commit", "uncommitted changes", "git could not say", "no commit"],
)
def test_that_the_code_is_the_same_is_said_only_where_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], git: dict[str, Any] | None, is_known: bool
) -> None:
    runs = [write_run(tmp_path / name, environment={"git": git}) for name in "ab"]
    assert compare(*runs, output=tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    sure = "Nothing stands against comparing these runs: their code and their data are the same."
    for text in (printed, page):
        assert (sure in text) is is_known
        assert ("Code: the same commit and packages." in text) is is_known
        assert ("Whether their code is the same is not known: see Code and machine." in text) is not is_known
        assert ("Code: no difference is recorded." in text) is not is_known
    assert ('class="verdict unsure"' in page) is not is_known
    assert 'class="verdict against"' not in page


def test_more_than_the_method_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optim__weight_decay=0.5)]
    assert compare(*runs, output=tmp_path / "out") == 1
    first = "Recipes differ in more than the method: optim.weight_decay."
    assert capsys.readouterr().out.startswith(first)
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert first in page
    assert page.index(first) < page.index("<h2>")


@pytest.mark.parametrize(
    "change",
    [
        {"num_bytes": 3},
        {"digests": {3: "other"}},
        {"environment": {"git": {"commit": "c" * 40, "dirty": False}}},
        {"scores": evaluation(num_classes=11)},
    ],
    ids=["data", "order", "code", "evaluation"],
)
def test_each_discrepancy_exits_with_1(tmp_path: Path, change: dict[str, Any]) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **change)]
    assert compare(*runs, output=tmp_path / "out") == 1
    (finding,) = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))["findings"]
    assert finding["kind"] in ("data", "code", "evaluation")


def test_costs_that_are_recorded_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = {"flops": 1.5e18, "energy_joules": 2500.0, "energy_source": "nvml", "carbon": {"grams": 12.5}}
    runs = [write_run(tmp_path / "a", summary={"cost": cost}), write_run(tmp_path / "b")]
    assert compare(*runs, output=tmp_path / "out") == 0
    assert "1.5e+18" in capsys.readouterr().out
    costs = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))["cost"]
    assert (costs["a"]["carbon.grams"], costs["b"]["carbon.grams"]) == (12.5, "not recorded")
    assert (costs["a"]["energy_source"], costs["b"]["flops"]) == ("nvml", "not recorded")


COST = {
    "since_step": 0,
    "train_seconds": 2.0,
    "device_hours": 2 / 3600,
    "flops_per_pair": 7,
    "model_flops": 3e12,
    "hardware_flops": 4e12,
    "objective_flops": 5e9,
    "energy_joules": 7200.0,
    "energy_source": "estimate: 10 W per device x seconds",
    "peak_memory_bytes": 3 * 2**30,
    "mfu": 0.25,
    "sections": {
        name: {"seconds": share, "share": share}
        for name, share in (("encode", 0.5), ("similarities/sums", 0.3), ("similarities/gradients", 0.2))
    },
}


def test_costs_and_shares_of_the_step_are_short_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, summary={"cost": COST}) for name in ("one", "two")]
    assert compare(*runs, output=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "see index.html" not in printed
    rows = {}
    for line in printed.partition("Cost of training")[2].partition("Also recorded")[0].splitlines():
        name, *cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells:
            assert name not in rows
            rows[name] = cells
    assert {name: first for name, (first, second) in rows.items() if first == second} == {
        "training, s": "2",
        "device-hours": "0.0005556",
        "pairs/s": "16",
        "world size": "1",
        "device": "cpu",
        "peak memory, GiB": "3",
        "model FLOPs": "3e+12",
        "hardware FLOPs": "4e+12",
        "objective FLOPs": "5e+09",
        "energy, Wh": "2 (estimate)",
        "MFU": "0.25",
        "encode": "50.0%",
        "similarities": "50.0%",
    }
    assert "Energy of all runs: estimate: 10 W per device x seconds." in printed
    cost = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))["cost"]["one"]
    assert (cost["energy, Wh"], cost["flops_per_pair"]) == (2.0, 7)
    assert cost["sections"] == {"encode": 0.5, "similarities/sums": 0.3, "similarities/gradients": 0.2}
    assert not {"train_seconds", "device_hours", "peak_memory_bytes", "energy_joules", "flops"} & set(cost)


def test_costs_of_many_runs_and_of_one_that_older_code_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / f"r{seed}", seed=seed, summary={"cost": COST}) for seed in range(13)]
    runs.append(write_run(tmp_path / "old", seed=13, summary={"cost": COST | {"since_step": 2}}, data__num_workers=9))
    compare(*runs, output=tmp_path / "out")
    printed = capsys.readouterr().out.partition("Cost of training")[2]
    assert "see index.html" not in printed
    assert "old: older code began the run; all but its seconds is counted from step 2 on." in printed
    assert "Recipes differ in data.num_workers: that can change times and memory." in printed
    assert "peak memory is that of the whole process" in printed
    assert "(estimate)" in printed


def test_torn_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    path = runs[1] / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert compare(*runs, output=tmp_path / "out") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl, line 4: not a step in JSON" in printed
    assert "a, b (seed 0, global batch 8): the same batches for steps 1..3." in printed


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00{", b"[]", b"{}", b"null", b"[" * 100_000])
def test_a_missing_or_torn_file_is_named_and_the_rest_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    runs = [write_run(tmp_path / label, seed=seed) for seed, label in enumerate("abc")]
    path = runs[1] / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    status = compare(*runs, output=tmp_path / "out")
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    # An empty mapping is a readable recipe or record; what it lacks shows as a difference instead.
    empty_is_whole = content == b"{}" and name in ("config.yaml", "environment.json", "summary.json")
    assert status == 1
    assert empty_is_whole or any(str(path) in text for text in document["runs"][1]["problems"])
    assert not document["runs"][0]["problems"]
    assert "Cost of training" in printed
    assert document["metrics"]["rows"]


def test_no_file_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "void").mkdir()
    assert compare(tmp_path / "empty", tmp_path / "void", output=tmp_path / "out") == 1
    document = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))
    assert document["verdict"] == "Fewer than two recipes could be read: whether they differ is unknown."
    assert [len(run["problems"]) for run in document["runs"]] == [5, 5]


def test_damaged_event_files(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    (runs[1] / "tensorboard").mkdir()
    (runs[1] / "tensorboard" / "events.out.tfevents.1.host").write_bytes(os.urandom(4000))
    assert compare(*runs, output=tmp_path / "out") in (0, 1)


def hostile_runs(tmp_path: Path) -> list[Path]:
    scores = {HOSTILE: evaluation()["zeroshot"], "big": evaluation()["retrieval"]}
    changes = {"environment": {"hostname": HOSTILE, "cpu": "\ud800", HOSTILE: 1}, "digests": {2: HOSTILE}}
    runs = [
        write_run(tmp_path / HOSTILE, scores=scores, summary={"cost": {HOSTILE: HOSTILE}}, **changes),
        write_run(tmp_path / "_b", scores=scores, summary={"device": HOSTILE, "status": HOSTILE}),
    ]
    config = runs[0] / "config.yaml"
    config.write_text(config.read_text("utf-8") + f"{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n", "utf-8")
    line = {"step": 5, "loss": 1e308, "samples_seen": 1e300, "step_time": -1e300, f"eval/{HOSTILE}": 1e308}
    with open(runs[0] / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n" + json.dumps(line | {"step": 6, "loss": -1e308}) + "\n")
    return runs


def test_hostile_names_and_values_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*hostile_runs(tmp_path), output=tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert not {"\x1b", "\u202e"} & set(printed)
    assert "[bold]" in printed
    text = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)" in text
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert page.handlers == []
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert "http:" not in text
    assert "https:" not in text


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on PATH")
    compare(*hostile_runs(tmp_path), output=tmp_path / "out")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    # Nothing but the page: a browser of its own accord looks for updates, and waits where there is no network.
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "out/index.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Comparison of 2 runs" in done.stdout, done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_names_that_are_no_utf8_and_equal_names(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    runs = [write_run(odd), write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")]
    assert compare(*runs, output=tmp_path / "out") == 0
    labels = [run["label"] for run in json.loads((tmp_path / "out/compare.json").read_text("utf-8"))["runs"]]
    assert labels == ["\\udcff", "x/run", "y/run"]


def test_a_table_with_a_column_for_each_of_many_runs_is_left_to_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / arm / f"seed{seed}", seed=seed) for arm in ("a", "b") for seed in range(7)]
    assert compare(*runs, output=tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "columns, see index.html." in shown
    assert "a/seed0" in shown


def test_a_yaml_bomb_is_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
    (runs[1] / "config.yaml").write_text("\n".join(["l0: &l0 [lol]", *levels]), "utf-8")
    assert compare(*runs, output=tmp_path / "out") == 1
    problems = json.loads((tmp_path / "out/compare.json").read_text("utf-8"))["runs"][1]["problems"]
    assert "has YAML aliases" in problems[0]


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (tmp_path / "file").write_text("")
    for runs, output, message in (
        ([], tmp_path / "out", "RUN: 0 given; a comparison takes at least two"),
        ([one], tmp_path / "out", "RUN: 1 given"),
        ([one, tmp_path / "none"], tmp_path / "out", "none: there is no such folder"),
        ([one, two, tmp_path / "b/../a"], tmp_path / "out", "a: given twice"),
        ([one, two], tmp_path / "file", "--output"),
    ):
        assert compare(*runs, output=output) == 2
        assert message in capsys.readouterr().err
    assert compare(one, two, output=tmp_path / "file" / "below") == 1
    assert "Give --output" in capsys.readouterr().err
