"""The command ``tokenreduce``, or ``python -m tokenreduce``: its first word may name a tool, otherwise it compares.

What is answered here takes no import of torch: the help, the version, an unknown tool, and a choice that there is not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from tokenreduce import choices
from tokenreduce.knobs import nearest
from tokenreduce.messages import SUCCESS, plain_warnings, refused, wants_everything

TOOLS = {
    "report": ("tokenreduce.report", "one page, tables and figures of finished runs"),
    "catalog": ("tokenreduce.catalog.__main__", "list, show and check what is installed; start a new method"),
}
"""The tools by their word: modules whose ``main`` takes the words behind it and returns the exit status, and what each
does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's own, and return its exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0].isidentifier():
        return _tool(words[0], words[1:])
    if words == ["--version"]:
        print(f"tokenreduce {metadata.version('tokenreduce')}")
        return SUCCESS
    with plain_warnings():
        if {"--help", "-h"} & {*words}:
            print(choices.overview({tool: purpose for tool, (_, purpose) in TOOLS.items()}))
            return SUCCESS
        try:
            choices.check(words)
        except ValueError as error:
            if wants_everything():
                raise
            return refused(error)
    return _run("tokenreduce.command", words)


def _tool(name: str, words: Sequence[str]) -> int:
    if name not in TOOLS:
        return refused(f"unknown tool {name!r}: {nearest(name, list(TOOLS))}; settings are given as NAME=VALUE")
    return _run(TOOLS[name][0], words)


def _run(module: str, words: Sequence[str]) -> int:
    status: int = import_module(module).main(words)
    return status


if __name__ == "__main__":
    sys.exit(main())
