"""What plugins import stays as it is: every public name, field and signature is compared with interface.txt.

After a change that is meant, `python tests/test_interface.py > tests/interface.txt` writes it down anew.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenreduce.registry import INTERFACE

HERE = Path(__file__).parent
SNAPSHOT = HERE / "interface.txt"
DOCUMENT = (HERE.parent / "docs" / "interface.md").read_text(encoding="utf-8")
REMEDY = """
The interface for plugins changed. Removed and changed lines break plugins: undo them, or raise
tokenreduce.registry.INTERFACE and say in CHANGELOG.md what authors have to do. Lines that are only added, and a new
parameter that has a default, need no new version. Then: python tests/test_interface.py > tests/interface.txt
"""


def interface() -> str:
    """The whole of it, a line for every name, field and method."""
    lines = [f"interface {INTERFACE}"]
    for name in documented_modules():
        lines += ["", name, *_module(importlib.import_module(name))]
    return "\n".join(lines) + "\n"


def documented_modules() -> list[str]:
    (table,) = re.findall(r"<!-- modules -->\n(.*?)\n<!-- /modules -->", DOCUMENT, re.DOTALL)
    return re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)


def _module(module: ModuleType) -> Iterator[str]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if _is_own(module, name)]
    for name in sorted(names):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield from _class(name, value)
        elif inspect.isfunction(value):
            yield f"  def {name}{_signature(value)}"
        elif isinstance(value, dict):
            yield f"  {name}: a dictionary"
        else:
            yield f"  {name} = {value}"


def _is_own(module: ModuleType, name: str) -> bool:
    """Public, and defined there: a class or function of that module, or a type's other name."""
    value = getattr(module, name)
    if name.startswith("_") or inspect.ismodule(value):
        return False
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__module__ == module.__name__
    return re.search(rf"^{name} = ", inspect.getsource(module), re.MULTILINE) is not None


def _class(name: str, cls: type) -> Iterator[str]:
    yield f"  class {name}({', '.join(base.__name__ for base in cls.__bases__)})"
    abstract: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    fields = {field.name for field in _fields(cls)}
    own_fields = fields - {field.name for base in cls.__bases__ for field in _fields(base)}
    for field in _fields(cls):
        if field.name in own_fields:
            yield f"    field {_field(field)}"
    if "__init__" in vars(cls) and not fields:
        yield f"    def __init__{_signature(vars(cls)['__init__'])}"
    for attribute, declared in sorted(inspect.get_annotations(cls).items()):
        if attribute not in fields and not attribute.startswith("_"):
            yield f"    {attribute}: {declared}"
    for member, value in sorted(vars(cls).items()):
        if member.startswith("_") and member not in ("__len__", "__getitem__"):
            continue
        prefix = "abstract " if member in abstract else ""
        if isinstance(value, property):
            yield f"    {prefix}property {member} -> {inspect.get_annotations(value.fget or len).get('return')}"
        elif isinstance(value, classmethod | staticmethod):
            yield f"    {prefix}{type(value).__name__} {member}{_signature(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"    {prefix}def {member}{_signature(value)}"


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _field(field: dataclasses.Field[Any]) -> str:
    """A line of its own for each, so that a new one is an added line and no changed one."""
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    made = "" if field.default_factory is dataclasses.MISSING else " = made anew"
    return f"{field.name}: {field.type}{default}{made}{', by name only' if field.kw_only else ''}"


def _signature(value: Any) -> str:
    """The signature, its annotations as they are written; a default that is a function is no more than that."""
    text = re.sub(r"<function .*? at 0x\w+>", "...", str(inspect.signature(value)))
    return re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", text)


def test_the_interface_is_what_was_written_down() -> None:
    before, now = SNAPSHOT.read_text(encoding="utf-8").splitlines(), interface().splitlines()
    difference = "\n".join(difflib.unified_diff(before, now, "tests/interface.txt", "the code", lineterm="", n=1))
    if difference:
        pytest.fail(f"{REMEDY}\n{difference}", pytrace=False)


def test_a_change_is_shown_as_a_readable_difference() -> None:
    lines = interface().splitlines()
    assert "  def best(scores: Tensor, count: int) -> Tensor" in lines
    assert any(line.startswith("    abstract def score(self, tokens: VisualTokens)") for line in lines)
    assert not [line for line in lines if " at 0x" in line]


def test_the_version_is_documented() -> None:
    assert f"`tokenreduce.registry.INTERFACE`: **{INTERFACE}**" in DOCUMENT
    assert f"Interface {INTERFACE}" in (HERE.parent / "CHANGELOG.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(interface(), end="")
