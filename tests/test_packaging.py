"""What the project says about installing and testing it is what continuous integration does."""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_continuous_integration_runs_the_readmes_own_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r'grep -m1 "(.+?)" README\.md', script)
    assert pattern is not None
    commands = [line for line in readme.splitlines() if re.search(pattern[1], line)]
    assert commands == ["pip install -c constraints.txt -e '.[test]' && pytest"]
    assert "pip install -c constraints.txt -e . && python -m tokenreduce reducer=fopru_row" in readme
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_dependency_is_constrained() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    listed = re.findall(
        r'"([A-Za-z][A-Za-z0-9_-]+)[<>=]', project.split("[project]")[1].split("[project.entry-points")[0]
    )
    assert len(listed) > 12
    assert not [name for name in listed if not re.search(rf"^{name}==", constraints, re.MULTILINE | re.IGNORECASE)]


def test_a_commit_is_checked_by_the_version_that_continuous_integration_uses() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    version = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert f"rev: v{version[1]}\n" in hooks
