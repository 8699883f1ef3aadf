"""Reports as one HTML file each: pictures inside, no reference to anywhere, everything escaped.

No script runs but the one that sorts tables, where a page asks for it: the page's policy names its hash.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any


def render(template: str, *, sorts: bool = False, **values: Any) -> str:
    """`template` of this folder with `values`; a value that is missing raises jinja2's UndefinedError.

    `sorts`: a click on a heading sorts the page's tables of class `sortable`.
    """
    import jinja2

    script = (Path(__file__).parent / "sorting.js").read_text("utf-8") if sorts else ""
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(script=script, script_hash=script_hash, **values)


def embedded(picture: bytes) -> str:
    """A PNG as the templates take it in."""
    return base64.b64encode(picture).decode("ascii")
