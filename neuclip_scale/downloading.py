"""img2dataset in an environment of its own: it pins webdataset<0.3 and pandas<3, which training does not use."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "1.47"
REQUIREMENTS = (f"img2dataset=={VERSION}.*", "standard-imghdr; python_version >= '3.13'")
"""What is installed; img2dataset imports imghdr, which Python 3.13 no longer has."""

_MARK = "complete.txt"
_LIBRARIES = ("libgl", "libgthread", "libglib")


class DownloadingError(RuntimeError):
    """img2dataset cannot be installed or started; the message says what happened and what to do."""


def img2dataset_environment(folder: Path | None = None) -> Path:
    """The Python of an environment with img2dataset in `folder`, made with pip if it is not there (about a minute).

    `folder` is by default `$NEUCLIP_CACHE/img2dataset-VERSION`, or the same below `~/.cache/neuclip-scale`. Several
    processes may ask at once: one makes it, the others wait. Raises `DownloadingError`.
    """
    folder = folder or default_folder()
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not _is_complete(folder, python):
        with _locked(folder):
            if not _is_complete(folder, python):
                _make(folder, python)
    return python


def img2dataset_command(python: Path) -> list[str]:
    """The start of a command line that runs img2dataset; its options follow as `--name=value`."""
    return [str(python), "-c", "from img2dataset.main import main; main()"]


def img2dataset_variables() -> dict[str, str]:
    """This process's environment variables without what would lead img2dataset to packages of another environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # One of its libraries would else ask the network for a newer version of itself at every start.
    return {**kept, "NO_ALBUMENTATIONS_UPDATE": "1"}


def default_folder() -> Path:
    """Where the environment lies unless another folder is given."""
    root = os.environ.get("NEUCLIP_CACHE")
    cache = Path(root).expanduser() if root else Path.home() / ".cache" / "neuclip-scale"
    return cache / f"img2dataset-{VERSION}"


def _is_complete(folder: Path, python: Path) -> bool:
    try:
        return python.exists() and (folder / _MARK).read_text("utf-8") == _mark()
    except OSError:
        return False


def _mark() -> str:
    return "\n".join(REQUIREMENTS) + "\n"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make the environment."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DownloadingError(
            f"no environment can be made in {folder} ({error.strerror}). Set NEUCLIP_CACHE to a folder that you can "
            "write to."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _make(folder: Path, python: Path) -> None:
    try:
        venv.EnvBuilder(with_pip=True, clear=True, symlinks=os.name != "nt").create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DownloadingError(
            f"no environment can be made in {folder} ({error}). Install Python's venv (Debian: python3-venv), or set "
            "NEUCLIP_CACHE to a folder with 1 GB of room."
        ) from error
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS], folder)
    _run([str(python), "-c", "import img2dataset"], folder)
    (folder / _MARK).write_text(_mark(), "utf-8")


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, env=img2dataset_variables(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line and not line.startswith("WARNING")]
        text = said[-1] if said else f"status {done.returncode}"
        remedy = (
            "Install the system library it names (Debian: libgl1, libglib2.0-0)."
            if any(name in text.lower() for name in _LIBRARIES)
            else f"Where this machine has no network, copy {folder} from one that has, with the same Python "
            f"({sys.version_info.major}.{sys.version_info.minor}) and at the same path."
        )
        raise DownloadingError(f"img2dataset {VERSION} could not be installed in {folder}: {text} {remedy}")
