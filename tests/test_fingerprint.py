"""A plugin's digest changes with all code and files that its answers come from, and with nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenreduce import create, fingerprint

Write = Callable[[dict[str, str]], None]

METHOD = """
from dataclasses import dataclass
from typing import Literal
from tokenreduce.reducer import TokenReducer
{imports}

@dataclass(frozen=True)
class Method(TokenReducer):
    weights: str = ""
    kind: Literal["table", "text"] = "table"
    others: tuple = ()
    def steps(self, geometry): return []
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes files into a folder that modules are imported from; what was imported is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, content in files.items():
            place = tmp_path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content, encoding="utf-8")
        importlib.invalidate_caches()
        fingerprint._distributions.cache_clear()

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    fingerprint._distributions.cache_clear()


def made(module: str, name: str = "Method", **settings: Any) -> Any:
    return getattr(importlib.import_module(module), name)(**settings)


@pytest.mark.parametrize(
    "imports",
    [
        "import myhelper",
        "from myhelper import WEIGHT",
        "import between",
        "def score():\n    import myhelper",
        "import importlib\nmyhelper = importlib.import_module('myhelper')",
    ],
)
def test_a_module_beside_the_methods_own_counts(write: Write, imports: str) -> None:
    files = {"between.py": "from myhelper import *\n", "myhelper.py": "WEIGHT = 1\n", "unrelated.py": "WEIGHT = 1\n"}
    write({"mymod.py": METHOD.format(imports=imports), **files})
    method = made("mymod")
    first = fingerprint.of(method)
    write({"unrelated.py": "WEIGHT = 2\n"})
    assert fingerprint.of(method) == first
    write({"myhelper.py": "WEIGHT = 2\n"})
    assert fingerprint.of(method) != first


def test_every_module_of_the_methods_package_counts(write: Write) -> None:
    write({"house/__init__.py": "", "house/methods/__init__.py": "", "house/common.py": "WEIGHT = 1\n"})
    write({"house/methods/mine.py": METHOD.format(imports="")})
    method = made("house.methods.mine")
    first = fingerprint.of(method)
    write({"house/common.py": "WEIGHT = 2\n"})
    assert fingerprint.of(method) != first


def test_the_packages_of_base_classes_and_held_plugins_count(write: Write) -> None:
    write({"base/__init__.py": METHOD.format(imports=""), "base/helper.py": "WEIGHT = 1\n"})
    write({"heir.py": "from base import Method as Base\nclass Method(Base): ...\n"})
    write({"other.py": METHOD.format(imports="")})
    heir, holder = made("heir"), made("other", others=({"inner": made("base")},))
    chain = create("chain", reducers=[made("other"), made("base")])
    first = [fingerprint.of(each) for each in (heir, holder, chain, made("other"))]
    write({"base/helper.py": "WEIGHT = 2\n"})
    second = [fingerprint.of(each) for each in (heir, holder, chain, made("other"))]
    assert [one == other for one, other in zip(first, second, strict=True)] == [False, False, False, True]


def test_an_installed_helper_counts_by_its_version_and_ones_own_by_its_source(write: Write, tmp_path: Path) -> None:
    place = tmp_path / "site-packages"
    sys.path.insert(0, str(place))

    def install(name: str, number: str, *modules: str) -> None:
        metadata = place / f"{name}.dist-info"
        metadata.mkdir(exist_ok=True, parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (metadata / "top_level.txt").write_text("\n".join(modules))

    def method() -> str:
        fingerprint._version.cache_clear()
        fingerprint._distributions.cache_clear()
        return fingerprint.of(made("bare_method"))

    try:
        install("mine", "1", "bare_method", "bare_helper")
        install("theirs", "1", "a_library")
        write({"site-packages/bare_method.py": METHOD.format(imports="import bare_helper, a_library")})
        write({f"site-packages/{name}.py": "WEIGHT = 1\n" for name in ("bare_helper", "a_library")})
        first = method()
        write({"site-packages/a_library.py": "WEIGHT = 2\n"})
        assert method() == first
        install("theirs", "2", "a_library")
        second = method()
        write({"site-packages/bare_helper.py": "WEIGHT = 2\n"})
        assert len({first, second, method()}) == 3
    finally:
        sys.path.remove(str(place))


def test_a_class_that_was_typed_in_is_like_no_other() -> None:
    def typed_in() -> type:
        namespace: dict[str, Any] = {"__name__": "a module without a file"}
        exec("class Method:\n    def score(self): return 1", namespace)
        return namespace["Method"]

    method, again = typed_in(), typed_in()
    assert fingerprint.code_of(method) == fingerprint.code_of(method) != fingerprint.code_of(again)


def test_the_files_that_settings_name_count_by_their_contents(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write({"mymod.py": METHOD.format(imports=""), "folder/inner/data": "1\n", "weights": "one", "table": "one"})
    named = [
        made("mymod", weights="weights"),
        made("mymod", weights=str(tmp_path / "folder")),
        made("mymod", others=("weights",)),
        create("chain", reducers=[made("mymod", weights="weights")]),
        create("cdpruner", clip="folder"),
    ]
    words = [
        made("mymod"),
        made("mymod", weights="no such file"),
        made("mymod", weights="."),
        made("mymod", weights="~"),
    ]
    first = [fingerprint.of(each) for each in named + words]
    write({"folder/inner/data": "2\n", "weights": "two", "table": "two"})
    second = [fingerprint.of(each) for each in named + words]
    changed = [one != other for one, other in zip(first, second, strict=True)]
    assert changed == [True] * len(named) + [False] * len(words)


def test_settings_and_class_count() -> None:
    digests = {
        fingerprint.of(create(name, **knobs))
        for name, knobs in (("random", {}), ("uniform", {}), ("random", {"seed": 1}), ("random", {"keep": 0.5}))
    }
    assert len(digests) == 4
    assert create("random").fingerprint() in digests


def test_this_package_counts_except_what_only_shows_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_of_contents", " ".join)
    read = fingerprint.library.__wrapped__().split()
    assert {"reducer.py", "registry.py", "benchmarks/scoring.py", "models/llava.py"} <= set(read)
    assert not {name for name in read if name.partition("/")[0] in ("catalog", "reporting", "testing")}


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_SETTLED", -1)  # as if it had been written long ago
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = fingerprint.file_digest(file)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("the file was read again"))
    assert fingerprint.file_digest(file) == first
    monkeypatch.setattr(Path, "open", opened)
    other = tmp_path / "other"
    other.write_bytes(b"two")
    other.replace(file)
    assert fingerprint.file_digest(file) != first


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "back").symlink_to(tmp_path)
    (tmp_path / "file").write_bytes(b"one")
    first = fingerprint.folder_digest(tmp_path)
    (tmp_path / "file").write_bytes(b"two")
    assert fingerprint.folder_digest(tmp_path) != first
