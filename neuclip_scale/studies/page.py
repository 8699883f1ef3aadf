"""One self-contained HTML page from titles, paragraphs, tables and pictures; everything that is text is escaped."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from neuclip_scale.files import write_text

_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right }
th:first-child, td:first-child { text-align: left } th { background: #f6f6f6; position: sticky; top: 0 }
img { max-width: 100%; height: auto } pre { background: #f6f6f6; padding: .7rem; overflow-x: auto }
</style>
<h1>{{ page.title }}</h1>
{% for section in page.sections %}<h2>{{ section.title }}</h2>
{% for text in section.paragraphs %}<p>{{ text }}</p>
{% endfor %}{% if section.code %}<pre>{{ section.code }}</pre>
{% endif %}{% if section.rows %}<table>
<thead><tr>{% for name in section.header %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% endif %}{% for picture in section.pictures %}
<p><img alt="{{ section.title }}" src="data:image/png;base64,{{ picture }}"></p>
{% endfor %}{% endfor %}</html>
"""


@dataclass
class Section:
    """A heading with what stands below it."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    """PNG files, which the page takes in."""
    code: str = ""

    @property
    def pictures(self) -> list[str]:
        """The images in base64."""
        return [base64.b64encode(path.read_bytes()).decode("ascii") for path in self.images]


@dataclass
class Page:
    """A report."""

    title: str
    sections: list[Section]

    def write(self, path: Path) -> None:
        """Write the page, atomically."""
        import jinja2

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        write_text(path, environment.from_string(_TEMPLATE).render(page=self))
