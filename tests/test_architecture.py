"""docs/architecture.md is what the code is: the floors, the names, the schemas and the list of modules.

Everything is read from the sources; nothing is imported. `python tests/test_architecture.py` writes the list anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from difflib import unified_diff
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tokenreduce"
PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
PATHS = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
"""Every module, by its place in the package."""


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(PATHS[name].read_text(encoding="utf-8"))


def sections(name: str) -> list[str]:
    return re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", TEXT, re.DOTALL)


# Imports


def file_of(dotted: str) -> str:
    """The file that an imported name comes from, as the list calls it; its last parts may be names within that."""
    parts = dotted.split(".")[1:]
    for length in range(len(parts), 0, -1):
        stem = "/".join(parts[:length])
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if name in PATHS:
                return name
    return "__init__.py"


def imported(tree: ast.AST) -> Iterator[str]:
    """The files of this package that a module imports, at its top or in a function; those for types alone do not
    count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are written in full"
            if (node.module or "").partition(".")[0] == "tokenreduce":
                yield from (file_of(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (file_of(each.name) for each in node.names if each.name.partition(".")[0] == "tokenreduce")
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imported(node)


def drawn_floors() -> dict[str, int]:
    """The floor of every module or package that the drawing names, from the bottom up."""
    (drawing,) = sections("floors")
    lines = [line.split("│")[1] for line in drawing.splitlines() if "│" in line]
    named = [re.split(r"\s{3,}", line.strip())[0].split() for line in lines]
    return {module: floor for floor, modules in enumerate(reversed(named)) for module in modules}


def floor_of(name: str, floors: dict[str, int]) -> int:
    """The floor of a file: that of its own name in the drawing, or of the package that it is in."""
    own, package = name.removesuffix(".py").replace("/", "."), name.partition("/")[0].removesuffix(".py")
    assert own in floors or package in floors, f"the drawing has no floor for {name}"
    return floors[own] if own in floors else floors[package]


def climbing(name: str, files: Iterable[str], floors: dict[str, int]) -> list[str]:
    """Those of the files that are on a floor above a module's own."""
    return [each for each in files if floor_of(each, floors) > floor_of(name, floors)]


def test_imports_run_downwards() -> None:
    floors = drawn_floors()
    found = {name: climbing(name, imported(parsed(name)), floors) for name in PATHS}
    assert {name: above for name, above in found.items() if above} == {}


def test_an_import_of_a_floor_above_is_noticed() -> None:
    source = "from tokenreduce import fingerprint, reporting\ndef late():\n    import tokenreduce.evaluation.clock"
    assert climbing("attach/call.py", imported(ast.parse(source)), drawn_floors()) == [
        "reporting/__init__.py",
        "evaluation/clock.py",
    ]


def test_no_modules_import_one_another_in_a_circle() -> None:
    others = {name: set(imported(parsed(name))) - {name} for name in PATHS}
    TopologicalSorter(others).prepare()


def test_the_drawing_names_what_is_there() -> None:
    tops = {name.partition("/")[0].removesuffix(".py") for name in PATHS}
    modules = {name.removesuffix(".py").replace("/", ".") for name in PATHS}
    assert tops <= drawn_floors().keys() <= tops | modules


# The list of modules


def module_list() -> str:
    return "".join(f"- `{name}`: {_first_sentence(name)}\n" for name in PATHS)


def _first_sentence(name: str) -> str:
    paragraph = (ast.get_docstring(parsed(name)) or "").split("\n\n")[0].replace("\n", " ")
    sentence = paragraph.split(". ")[0].removesuffix(".")
    return re.sub(r":\w+:`", "`", sentence).replace("``", "`")


def test_the_list_of_modules_is_the_tree() -> None:
    (written,) = sections("modules")
    difference = "\n".join(unified_diff(written.splitlines(), module_list().splitlines(), lineterm="", n=0))
    if difference:
        pytest.fail(f"run `python tests/test_architecture.py`\n{difference}", pytrace=False)


# Names


@cache
def definitions() -> frozenset[str]:
    """Every class, function and constant of the package, and every member of a class as Class.member."""
    found: set[str] = set()
    for name in PATHS:
        for node in parsed(name).body:
            found.update(_names(node))
            if isinstance(node, ast.ClassDef):
                found.update(f"{node.name}.{member}" for inner in node.body for member in _names(inner))
    return frozenset(found)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


ELSEWHERE = {"forward", "generate", "mm_encoder_outputs", "records.jsonl", "metrics.json", "schema", "hf", "jsonl"}
"""Names of transformers, files and keys that are written, and names of plugins."""


def quoted() -> set[str]:
    """What stands in backquotes outside of the list of modules."""
    return set(re.findall(r"`([^`\n ]+)`", TEXT.partition("<!-- modules -->")[0]))


def is_place(text: str) -> bool:
    return "/" in text or text.endswith((".py", ".toml"))


def test_places_exist() -> None:
    places = [text for text in quoted() if is_place(text)]
    assert len(places) > 30
    assert [place for place in places if not any((folder / place).exists() for folder in (PACKAGE, ROOT))] == []


def test_names_exist() -> None:
    names = {text for text in quoted() if not is_place(text)}
    members = {name.partition(".")[2] for name in definitions()}
    assert len(names) > 100
    assert names - definitions() - members - ELSEWHERE == set()


# Schemas


def fields(cls: str, files: tuple[str, ...]) -> list[str]:
    """The fields of a dataclass, those of its bases first."""
    nodes = [
        node for name in files for node in parsed(name).body if isinstance(node, ast.ClassDef) and node.name == cls
    ]
    assert len(nodes) == 1, f"{len(nodes)} classes {cls}"
    inherited = [field for base in nodes[0].bases for field in fields(ast.unparse(base), files)]
    return inherited + [
        node.target.id
        for node in nodes[0].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


@pytest.mark.parametrize(
    ("number", "files"),
    [
        (0, ("evaluation/records.py", "passage.py", "reducer.py")),
        (1, ("evaluation/result.py", "evaluation/statistics.py")),
    ],
    ids=["records.jsonl", "metrics.json"],
)
def test_schemas_are_those_of_the_dataclasses(number: int, files: tuple[str, ...]) -> None:
    described: dict[str, list[str]] = {}
    for cls, names in re.findall(r"^\| `(\w+)` \| (.+?) \|", sections("schema")[number], re.MULTILINE):
        described.setdefault(cls, []).extend(re.findall(r"`(\w+)`", names))
    assert described
    for cls, names in described.items():
        assert sorted(names) == sorted(fields(cls, files)), cls


@pytest.mark.parametrize(("title", "file"), [("records.jsonl", "records.py"), ("metrics.json", "result.py")])
def test_the_version_of_a_schema_is_the_one_that_is_written(title: str, file: str) -> None:
    (version,) = re.findall(r"^SCHEMA = (\d+)$", PATHS[f"evaluation/{file}"].read_text(encoding="utf-8"), re.MULTILINE)
    assert f"### {title}, schema {version}\n" in TEXT


if __name__ == "__main__":
    head, rest = TEXT.split("<!-- modules -->\n")
    tail = rest.split("<!-- /modules -->")[1]
    PAGE.write_text(f"{head}<!-- modules -->\n{module_list()}<!-- /modules -->{tail}", encoding="utf-8")
