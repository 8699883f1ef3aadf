"""open_clip, imported once a session: it takes about six seconds."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    import open_clip

    return open_clip
