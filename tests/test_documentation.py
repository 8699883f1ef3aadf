"""Every command of the documentation is one that the program understands, down to each option and recipe field; what
it points at exists.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from neuclip_scale import cli
from neuclip_scale.commands.plan import FLAGS
from neuclip_scale.commands.train import split_arguments
from neuclip_scale.config import load_recipe
from neuclip_scale.studies.methods.plan import arms, base_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSED_OTHERWISE = ("status", "preflight", "doctor", "job")
"""Commands whose options are not read by tyro."""


class UnderstoodError(Exception):
    """What tyro made of a command's words; raised in its place, so that nothing is run."""


def commands(page: Path) -> Iterator[str]:
    """The indented lines with `neuclip ...`, continued lines joined; loops stand for their first round.

    Lines that show a usage, with alternatives or `...`, are none.
    """
    loop: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", "", page.read_text("utf-8")).splitlines():
        if not line.startswith("    "):
            loop = {}
            continue
        if begun := re.match(r"\s*for (\w+) in (\S+)", line):
            loop = {begun[1]: begun[2]}
        for name, value in loop.items():
            first, _, second = value.partition(":")
            line = line.replace(f"${{{name}%:*}}", first).replace(f"${{{name}#*:}}", second).replace(f"${name}", value)
        found = re.match(r"\s*(?:\S*torchrun .*?)?(?:\.venv/bin/)?(neuclip [a-z].*)", line)
        if found and not re.search(r" \.\.\.|\[|\w\|\w", found[1]):
            yield found[1]


DOCUMENTED = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]


def test_commands_are_found() -> None:
    assert {command.split()[1] for _, command in DOCUMENTED} >= {"train", "plan", "evaluate", "study", "reshard"}
    assert len(DOCUMENTED) >= 35


@pytest.mark.parametrize(("page", "command"), DOCUMENTED)
def test_a_command_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)[1:]
    assert words[0] in cli.COMMANDS
    if words[0] in PARSED_OTHERWISE:
        return
    whole = tyro.cli

    def understand(*given: Any, **options: Any) -> Any:
        raise UnderstoodError(whole(*given, **options))

    monkeypatch.setattr(tyro, "cli", understand)
    with pytest.raises(UnderstoodError) as caught:
        cli.main(words)
    parsed = caught.value.args[0]
    if words[:2] == ["study", "methods"]:
        base_recipe(parsed)
        for arm in arms(parsed):
            load_recipe(parsed.recipe, [*parsed.overrides, f"objective.name={arm.method}", *arm.changes])
    if words[0] == "plan":
        load_recipe(parsed.recipe, split_arguments(words[1:], flags=FLAGS)[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_targets_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page.name} links to {link}"
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= rules
    for path in re.findall(r"(?<![\w/])(?:slurm|tools|examples|ds_configs)/[a-z_/]+\.(?:sh|py|json)\b", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
