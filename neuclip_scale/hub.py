"""Data sets from the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class HubError(RuntimeError):
    """A data set could not be fetched; the message says what the hub or the network answered."""


def fetch_dataset(repository: str, folder: Path, patterns: Sequence[str] | str) -> None:
    """Download the files of a data set that match `patterns` into `folder`; one that was cut off goes on.

    Asks the hub that HF_ENDPOINT names. Raises `HubError`.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            repository,
            repo_type="dataset",
            local_dir=folder,
            allow_patterns=patterns if isinstance(patterns, str) else list(patterns),
            endpoint=os.environ.get("HF_ENDPOINT") or None,
        )
    except Exception as error:  # whatever it is: its error classes have changed their names and parents
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HubError(f"{repository} could not be fetched ({type(error).__name__}: {reason})") from error
