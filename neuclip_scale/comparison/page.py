"""A comparison as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping

from neuclip_scale.comparison.comparing import Comparison
from neuclip_scale.comparison.sections import conclusion, sections, summary_lines
from neuclip_scale.html import embedded, render


def render_page(comparison: Comparison, pictures: Mapping[str, bytes]) -> str:
    """The page as HTML; `pictures` maps titles to PNGs. Everything from the run folders is escaped."""
    verdict, findings = summary_lines(comparison)
    *parts, cost = sections(comparison)
    return render(
        "comparison.html",
        num_runs=len(comparison.runs),
        comparable=comparison.comparable,
        is_sure=comparison.is_sure,
        conclusion=conclusion(comparison),
        verdict=verdict,
        findings=findings,
        parts=parts,
        cost=cost,
        pictures={title: embedded(data) for title, data in pictures.items()},
    )
