"""A plugin stands on the interface alone, so that a third party's can do whatever a built-in one does."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
ALLOWED = {"tokenreduce.reducer", "tokenreduce.signals", "torch", "einops"}


def imported(source: str) -> Iterator[str]:
    """The modules that ``source`` imports, those beside it with their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def is_allowed(module: str) -> bool:
    top = module.split(".")[0]
    return module in ALLOWED or top in {"torch", "einops"} or top in sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("*.py")), ids=lambda path: path.stem)
def test_plugins_import_the_interface_torch_and_einops_only(path: Path) -> None:
    assert [module for module in imported(path.read_text()) if not is_allowed(module)] == []


@pytest.mark.parametrize(
    "line",
    ["import numpy", "from tokenreduce import create", "from .fopru import significance", "import tokenreduce.attach"],
)
def test_other_imports_are_noticed(line: str) -> None:
    assert not all(is_allowed(module) for module in imported(line))
