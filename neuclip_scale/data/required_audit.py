"""What a training run asks of an audit: that it is whole, passed, and is of these very shards.

It imports nothing that queries need, so that training does not depend on the extra `audit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip_scale.files import json_ready

FORMAT = 1
_NOT_HASHED = ("created", "engine", "seconds", "digest", "neuclip_scale", "inputs")
"""What may differ between two audits of the same data."""


class RequiredAuditError(ValueError):
    """An audit that does not allow a run; the message says why and names the remedy."""


@dataclass(frozen=True)
class RequiredAudit:
    """The audit that a run was trained under."""

    digest: str
    download: str
    """Which of the audited downloads its shards are."""


def digest_of(document: Mapping[str, Any]) -> str:
    """32 hex digits over what was found, equal on any engine and machine."""
    found = {key: value for key, value in document.items() if key not in _NOT_HASHED}
    found["downloads"] = [{key: value for key, value in part.items() if key != "path"} for part in found["downloads"]]
    text = json.dumps(_rounded(json_ready(found)), sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def required_audit(path: str | Path, fingerprint: str) -> RequiredAudit:
    """Read audit.json and hold it against the fingerprint of the training data (`Manifest.fingerprint`).

    Raises `RequiredAuditError` when it is no audit, was changed, found a discrepancy, or is of other shards.
    """
    try:
        document = json.loads(Path(path).read_bytes())
        found, digest = document["format"], document["digest"]
        downloads = {part["fingerprint"]: part["name"] for part in document["downloads"]}
        actual = digest_of(document) if found == FORMAT else ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RequiredAuditError(
            f"data.require_audit = {path}: no audit.json ({error}). Make it with `neuclip audit`."
        ) from error
    if found != FORMAT:
        raise RequiredAuditError(
            f"data.require_audit = {path}: format {found}, this version reads {FORMAT}. Audit anew."
        )
    if digest != actual:
        raise RequiredAuditError(
            f"data.require_audit = {path}: was changed after the audit (digest {actual}). Audit anew."
        )
    if fingerprint not in downloads:
        names = ", ".join(f"{name} {print_}" for print_, name in downloads.items())
        raise RequiredAuditError(
            f"data.require_audit = {path}: is of other shards than data.train (fingerprint {fingerprint}; audited: "
            f"{names}). Audit these shards."
        )
    if document["status"] != 0:
        first = next((each["text"] for each in document["findings"] if each["is_discrepancy"]), "")
        raise RequiredAuditError(
            f"data.require_audit = {path}: found discrepancies ({first}). Mend the data, or audit with limits that "
            "allow for them."
        )
    return RequiredAudit(digest, downloads[fingerprint])


def _rounded(value: Any) -> Any:
    """Engines sum in other orders: floats are compared to nine digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
