"""`--launcher`, the words before `neuclip`."""

from __future__ import annotations

import shlex
import shutil

from neuclip_scale.config.errors import ConfigError


def check_launcher(text: str) -> None:
    """Raise `ConfigError` unless a shell can split `text`, and its first word is a program that can be started here."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError("--launcher", text, f"a shell could not read it ({error})", "Close what is open.") from error
    if words and shutil.which(words[0]) is None:
        problem = f"{words[0]} is not an executable program here"
        raise ConfigError("--launcher", text, problem, "Install it, or give its whole path.")
