"""`audit.json`: everything the report shows, in one versioned document."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from neuclip_scale import __version__
from neuclip_scale.audit.auditing import Audit
from neuclip_scale.audit.findings import findings_of_download, findings_of_pair
from neuclip_scale.audit.mattering import effect_of
from neuclip_scale.audit.membership import CLASSES
from neuclip_scale.data.required_audit import FORMAT, digest_of
from neuclip_scale.untrusted_text import printable


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
        "engine": request.engine.engine,
        "inputs": {
            "manifest": printable(request.manifest),
            "downloads": {download.name: printable(str(download.path)) for download in inputs.downloads},
            "runs": {run.name: printable(str(run.path)) for run in inputs.runs},
            "subset_file": printable(str(request.subset_file)) if request.subset_file else None,
        },
        "identity": inputs.identity,
        "columns": list(inputs.published.columns),
        "has_text": bool(inputs.published.text),
        "has_uids": bool(inputs.published.uid),
        "classes": CLASSES,
        "thresholds": asdict(request.thresholds),
        "status": int(any(finding.is_discrepancy for finding in findings)),
        "findings": [asdict(finding) for finding in findings],
        "notes": [*inputs.notes, *audit.notes(downloads)],
        "counts": downloads[0]["counts"],
        "downloads": downloads,
        "pairs": [asdict(pair) for pair in pairs],
        "runs": audit.runs(),
        "effect": effect_of(pairs[0], request.claim) if pairs else None,
        "empirical": None,
        "seconds": audit.seconds,
    }


def add_digest(document: dict[str, Any]) -> None:
    """Set `digest`, over all the rest; a document whose own differs was changed by hand."""
    document["digest"] = digest_of(document)
