"""Imports go downward by layer, heavy libraries stay in one place, and the front door stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "neuclip_scale"
ROOT = Path(__file__).parents[1] / PACKAGE

# The longest matching prefix decides: data.manifest is layer 0 although data is layer 2.
LAYERS = {
    "config": 0,
    "files": 0,
    "heartbeat": 0,
    "html": 0,
    "rank_logs": 0,
    "run_folder": 0,
    "untrusted_text": 0,
    "data.decoding": 0,
    "data.manifest": 0,
    "data.manifest_file": 0,
    "data.shards": 0,
    "projection": 1,
    "sections": 1,
    "transfers": 1,
    "distributed": 1,
    "similarity": 1,
    "models": 2,
    "normalizers": 2,
    "data": 2,
    "optim": 2,
    "telemetry": 2,
    "objectives": 3,
    "losses": 3,
    "engines": 3,
    "grad_cache": 3,
    "checkpoint": 3,
    "evaluation": 3,
    "comparison": 4,
    "cost": 4,
    "run_attempts": 4,
    "run_owner": 4,
    "run_status": 4,
    "launched_step": 4,
    "non_finite": 4,
    "run_state": 4,
    "run_summary": 4,
    "trainer": 4,
    "planning": 4,
    "audit": 4,
    "downloading": 1,
    "hub": 1,
    "preflight": 4,
    "reshard": 1,
    "queries": 1,
    "subset": 4,
    "studies": 4,
    "reproduce": 5,
    "cli": 5,
    "commands": 5,
    "__main__": 5,
}
IN_ONE_MODULE = ("huggingface_hub", "deepspeed", "timm", "open_clip", "duckdb", "jinja2", "fasttext")
TRITON_MODULES = ("similarity.triton_", "normalizers.triton_", "models.triton_")
"""These import Triton when they are imported themselves, which others do inside functions."""
WITHOUT_TORCH = (
    "config",
    "files",
    "heartbeat",
    "html",
    "rank_logs",
    "run_attempts",
    "run_owner",
    "run_folder",
    "run_status",
    "untrusted_text",
    "comparison",
    "data.decoding",
    "data.manifest",
    "data.manifest_file",
    "data.shards",
    "reshard",
    "audit",
    "queries",
    "subset",
    "downloading",
    "hub",
)


class Import(NamedTuple):
    module: str
    """Importing module, below the package: `data.shards`; the package itself is the empty string."""
    name: str
    """What is imported, as an absolute name: `torch.nn`, `neuclip_scale.config`."""
    line: int
    at_top: bool
    """Whether it runs when the module is imported."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> list[Import]:
    return [found for module, path in modules().items() for found in imports_of(module, path)]


def imports_of(module: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text("utf-8"))
    inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, path)
            # `from package import module` imports the module, `from module import name` does not.
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        for name in dict.fromkeys(names):
            yield Import(module, name, node.lineno, id(node) not in inside)


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = [PACKAGE, *filter(None, module.split("."))]
    up = node.level - (path.name == "__init__.py")
    return ".".join(package[: len(package) - up] + ([node.module] if node.module else []))


def is_module(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.") and name.removeprefix(f"{PACKAGE}.") in modules()


def below(name: str) -> str | None:
    """The name below the package, or None for another package and for the package's own cheap front."""
    return name.removeprefix(f"{PACKAGE}.") if name.startswith(f"{PACKAGE}.") else None


def unit(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    matches = [entry for entry in LAYERS if module == entry or module.startswith(f"{entry}.")]
    assert matches, f"{module} has no layer: add it to LAYERS and to docs/architecture.md"
    return max(matches, key=len)


def where(found: Import) -> str:
    return f"{PACKAGE}/{found.module.replace('.', '/')}:{found.line} imports {found.name}"


def internal() -> Iterator[tuple[Import, str]]:
    """Imports between modules of the package; its front is left out, which loads names on first use only."""
    for found in imports():
        target = below(found.name)
        if found.module and target:
            yield found, target


def test_there_is_something_to_check() -> None:
    assert len(modules()) > 20
    assert len(list(internal())) > 30


def test_imports_go_downward() -> None:
    upward = [where(found) for found, target in internal() if LAYERS[unit(target)] > LAYERS[unit(found.module)]]
    assert not upward, "\n".join(upward)


def test_no_cycle_between_neighbours() -> None:
    """Units of one layer may use each other, but not in a circle."""
    uses: dict[str, set[str]] = {entry: set() for entry in LAYERS}
    for found, target in internal():
        if unit(target) != unit(found.module):
            uses[unit(found.module)].add(unit(target))
    while leaves := {entry for entry, targets in uses.items() if not targets & uses.keys()}:
        uses = {entry: targets for entry, targets in uses.items() if entry not in leaves}
    assert not uses, f"these import each other in a circle: {uses}"


@pytest.mark.parametrize("library", IN_ONE_MODULE)
def test_heavy_libraries_are_imported_lazily_in_one_place(library: str) -> None:
    found = [each for each in imports() if each.name.split(".")[0] == library]
    assert len({each.module for each in found}) <= 1, "\n".join(map(where, found))
    assert not [where(each) for each in found if each.at_top]


def test_triton_is_imported_where_it_runs_only() -> None:
    assert any(found.name.split(".")[0] == "triton" for found in imports())
    for found in imports():
        if found.module.startswith(TRITON_MODULES):
            continue
        assert found.name.split(".")[0] != "triton", where(found)
        assert not ((below(found.name) or "").startswith(TRITON_MODULES) and found.at_top), where(found)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_layer_zero_names_no_torch(module: str) -> None:
    found = [each for each in imports() if unit_or_none(each.module) == module]
    assert found, f"{module} is gone: mend WITHOUT_TORCH"
    assert not [where(each) for each in found if each.name.split(".")[0] in ("torch", "torchvision")]


def unit_or_none(module: str) -> str | None:
    return unit(module) if module else None


@pytest.mark.parametrize(
    "statement",
    [
        "import neuclip_scale",
        "from neuclip_scale.cli import main; main(['--help'])",
        "from neuclip_scale import load_recipe",
        "import neuclip_scale.commands.compare",
        "import neuclip_scale.commands.doctor",
        "import neuclip_scale.commands.job",
        "import neuclip_scale.commands.status",
        "import neuclip_scale.commands.plan",
        *(f"import neuclip_scale.{module}" for module in WITHOUT_TORCH),
    ],
)
def test_cheap_imports_do_not_load_torch(statement: str) -> None:
    script = f"{statement}\nimport sys; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
