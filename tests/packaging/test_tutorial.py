"""docs/plugins.md, followed word for word from an empty folder, in an environment with nothing but the wheel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .environment import ROOT, Environment

pytestmark = pytest.mark.xdist_group("installed")

TUTORIAL = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+(\.\d+)?")
PACKAGES = "surprise greys ours"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is the content of, and its text."""

    language: str
    title: str | None
    text: str


def blocks() -> Iterator[Block]:
    for language, title, text in re.findall(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', TUTORIAL, re.M | re.S):
        yield Block(language, title or None, text)


def plain(text: str) -> str:
    """One space between words, and no figures: what is the same on every machine."""
    return NUMBER.sub("#", " ".join(text.split()))


@pytest.fixture
def folder(environment: Environment, tmp_path: Path) -> Iterator[Path]:
    """An empty folder, and an environment that is left as it was found."""
    yield tmp_path
    environment.run(f"pip uninstall --yes {PACKAGES}", tmp_path)


def test_the_tutorial_word_for_word(environment: Environment, folder: Path) -> None:
    printed = ""
    for block in blocks():
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            printed = environment.run(block.text, folder)
            assert "\nwarning:" not in printed
        elif block.language == "text":
            for line in block.text.splitlines():
                assert plain(line) in plain(printed), printed
        else:
            pytest.fail(f"a block of {block.language} that is neither typed nor written")
    row = next(line for line in (folder / "report" / "report.md").read_text().splitlines() if "surprise" in line)
    assert " 36 " in row
    assert "surprise" in (folder / "report" / "index.html").read_text(encoding="utf-8")


def test_the_idea_takes_thirty_lines() -> None:
    method = next(block for block in blocks() if block.title and block.title.endswith("__init__.py"))
    code = re.sub(r'""".*?"""', "", method.text, flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
