"""The real packages, fetched once a session; tests that need them are skipped where npm has no registry."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_helpers import demo_options

from neuclip_scale.data.demo.build import DemoResult, build_demo
from neuclip_scale.data.demo.npm import FetchError, default_cache, fetch, missing_packages
from neuclip_scale.data.demo.sources import SOURCES


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with every package: the user's own if it is complete, else a fresh one filled by npm."""
    if not missing_packages(default_cache(), SOURCES):
        return default_cache()
    cache = tmp_path_factory.mktemp("cache")
    try:
        fetch(cache, SOURCES)
    except FetchError as error:
        pytest.skip(f"npm or its registry cannot be reached: {error}")
    return cache


@pytest.fixture(scope="session")
def small_demo(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    """A demo folder of 400 names, made from the real packages."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, build_demo(demo_options(out, demo_cache), lambda *_: None)
