"""Reports as one HTML file each: pictures inside, no script, no reference to anywhere, everything escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any


def render(template: str, **values: Any) -> str:
    """`template` of this folder with `values`; a value that is missing raises jinja2's UndefinedError."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def embedded(picture: bytes) -> str:
    """A PNG as the templates take it in."""
    return base64.b64encode(picture).decode("ascii")
