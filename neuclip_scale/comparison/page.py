"""A comparison as one HTML file that needs no other: pictures inside, no script, no reference to anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources

from neuclip_scale.comparison.comparing import Comparison
from neuclip_scale.comparison.sections import sections, summary_lines


def render_page(comparison: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The page as HTML; `pictures` maps titles to PNGs. Everything from the run folders is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (resources.files("neuclip_scale.comparison") / "page.html").read_text("utf-8")
    verdict, findings = summary_lines(comparison)
    *parts, cost = sections(comparison)
    return environment.from_string(template).render(
        num_runs=len(comparison.runs),
        comparable=comparison.comparable,
        verdict=verdict,
        findings=findings,
        parts=parts,
        cost=cost,
        pictures={title: base64.b64encode(data).decode("ascii") for title, data in pictures.items()},
    )
