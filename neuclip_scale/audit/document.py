"""`audit.json`: everything the report shows, in one versioned document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from neuclip_scale import __version__
from neuclip_scale.audit.auditing import Audit
from neuclip_scale.audit.findings import findings_of_download, findings_of_pair
from neuclip_scale.audit.mattering import effect_of
from neuclip_scale.audit.membership import CLASSES
from neuclip_scale.files import json_ready

FORMAT = 1
_NOT_HASHED = ("created", "engine", "seconds", "digest", "neuclip_scale", "inputs")
"""What may differ between two audits of the same data."""


def build_document(audit: Audit) -> dict[str, Any]:
    """Compute all parts; `lists` is added by whoever writes them, and then the digest."""
    request, inputs = audit.request, audit.inputs
    downloads = [audit.download_part(i) for i in range(len(inputs.downloads))]
    pairs = audit.pairs()
    findings = [
        *(f for part in downloads for f in findings_of_download(part, request.thresholds)),
        *(f for pair in pairs for f in findings_of_pair(pair, request.thresholds)),
    ]
    return {
        "format": FORMAT,
        "neuclip_scale": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "engine": request.engine.name,
        "inputs": {
            "manifest": request.manifest,
            "downloads": {download.name: str(download.path) for download in inputs.downloads},
            "runs": {run.name: str(run.path) for run in inputs.runs},
            "subset_file": str(request.subset_file) if request.subset_file else None,
        },
        "identity": inputs.identity,
        "columns": list(inputs.published.columns),
        "classes": CLASSES,
        "thresholds": asdict(request.thresholds),
        "status": int(any(finding.is_discrepancy for finding in findings)),
        "findings": [asdict(finding) for finding in findings],
        "notes": list(inputs.notes),
        "counts": downloads[0]["counts"],
        "downloads": downloads,
        "pairs": [asdict(pair) for pair in pairs],
        "runs": audit.runs(),
        "effect": effect_of(pairs[0], request.claim) if pairs else None,
        "empirical": None,
        "seconds": audit.seconds,
    }


def add_digest(document: dict[str, Any]) -> None:
    """Set `digest`: 32 hex digits over what was found, equal on any engine and machine."""
    document["digest"] = digest_of(document)


def digest_of(document: Mapping[str, Any]) -> str:
    """What `digest` must be; a document whose own differs was changed by hand."""
    found = {key: value for key, value in document.items() if key not in _NOT_HASHED}
    found["downloads"] = [{key: value for key, value in part.items() if key != "path"} for part in found["downloads"]]
    text = json.dumps(_rounded(json_ready(found)), sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _rounded(value: Any) -> Any:
    """Engines sum in other orders: floats are compared to nine digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
