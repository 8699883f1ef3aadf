"""Stage `report`: one HTML page, the same in Markdown, and report.json; made anew each time, from what is there."""

from __future__ import annotations

from pathlib import Path

from neuclip_scale.files import write_json, write_text
from neuclip_scale.reproduce.figures import draw_figures
from neuclip_scale.reproduce.report_sections import (
    all_published_section,
    cost_section,
    data_section,
    differences_section,
    document,
    published_section,
    scores_section,
    settings_section,
    stages_section,
)
from neuclip_scale.reproduce.request import Request
from neuclip_scale.reproduce.results import gather
from neuclip_scale.reproduce.running import Runner
from neuclip_scale.reproduce.stages import Stage
from neuclip_scale.studies.page import Page, Section


def report_stage(request: Request, stages: list[Stage]) -> Stage:
    """`stages`: all others in their order."""
    folder = request.places.report
    return Stage(
        "report", tuple(stage.name for stage in stages), {}, do=lambda _: write_report(request, stages), kind="report",
        told=(f"write {folder / 'index.html'}, report.md, report.json",),
    )  # fmt: skip


def write_report(request: Request, stages: list[Stage]) -> None:
    """Write the report of what is finished; what is not is called so. Raises `ReproduceError` for stages that were
    done with other settings.
    """
    runner = Runner(stages, request.places, lambda _: None)
    done = {name: stage for name, stage in runner.stages.items() if runner.is_done(stage)}
    results = gather(request, {name: runner.record(stage) for name, stage in done.items()})
    folder = request.places.report
    figures = draw_figures(results, folder / "figures")
    sections = [
        published_section(results), scores_section(results), differences_section(results),
        Section("Figures", images=figures), data_section(results), settings_section(results),
        cost_section(results, request.price), all_published_section(results),
        stages_section(results, list(runner.stages)),
    ]  # fmt: skip
    title = f"Reproduction: {request.experiment.title}"
    Page(title, sections).write(folder / "index.html")
    write_text(folder / "report.md", markdown(title, sections, folder))
    write_json(folder / "report.json", document(results, sections))


def markdown(title: str, sections: list[Section], folder: Path) -> str:
    """The sections in GitHub's Markdown; pictures by their names below `folder`."""
    lines = [f"# {_plain(title)}", ""]
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""]
        for text in section.paragraphs:
            lines += [_plain(text), ""]
        if section.rows:
            lines += [_row(section.header), _row(["---"] * len(section.header)), *map(_row, section.rows), ""]
        for image in section.images:
            lines += [f"![{image.stem}]({image.relative_to(folder).as_posix()})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """Nothing in it is markup."""
    return "".join(f"\\{char}" if char in "\\|<>`*_" else char for char in text.replace("\n", " "))
