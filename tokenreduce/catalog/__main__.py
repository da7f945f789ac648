"""``python -m tokenreduce.catalog``: list, show and check plugins, and make the package of a new one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenreduce.catalog.description import REGISTRIES, described, example, find, hosted, knobs, plugins, presets
from tokenreduce.catalog.scaffold import create_package
from tokenreduce.catalog.table import models_table, table
from tokenreduce.catalog.verdict import FAILED, Finding, findings
from tokenreduce.messages import SUCCESS, plain_warnings, refused
from tokenreduce.models.family import ModelFamily
from tokenreduce.registry import INTERFACE, Problem

BROKEN_PROMISE = 1
TABLES = {"reducers": table, "models": models_table}
UNLIMITED = 10_000
"""Columns where nobody looks: a row of a table that goes into a file or a pipe stays on one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's own, and return its exit status."""
    options = _parser().parse_args(arguments)
    with plain_warnings():
        try:
            status: int = options.run(options)
        except (ValueError, TypeError, OSError) as error:
            return refused(error)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenreduce.catalog", description="Installed plugins, and the package of a new one."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="every installed reducer, model family and benchmark")
    command.add_argument("pattern", nargs="?", default="*", help="only names like this, such as 'fopru*'")
    command.add_argument("--kind", choices=REGISTRIES)
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="one plugin: what it does, its knobs and presets")
    command.add_argument("name")
    command.add_argument("--kind", choices=REGISTRIES, help="where a name is used for several")
    command.set_defaults(run=_show)

    command = commands.add_parser("check", help="hold one plugin to the invariants; exit status 1 if it breaks one")
    command.add_argument("name")
    command.add_argument("knobs", nargs="*", metavar="KNOB=VALUE", help="settings other than the defaults")
    command.add_argument("--kind", choices=REGISTRIES, help="where a name is used for several")
    command.add_argument("--model", metavar="DIRECTORY", help="a checkpoint in place of small random ones")
    command.set_defaults(run=_check)

    command = commands.add_parser("new", help="make a package with one reducer, its preset and its tests")
    command.add_argument("name", help="of the reducer, its module and its package")
    command.add_argument("--output", type=Path, default=Path(), help="where its folder is made; by default here")
    command.set_defaults(run=_new)

    command = commands.add_parser("table", help="the README's tables, in Markdown")
    command.add_argument("of", nargs="?", choices=TABLES, default="reducers")
    command.set_defaults(run=_table_in_markdown)
    return parser


def _list(options: argparse.Namespace) -> int:
    usable, problems = plugins()
    listed = [
        plugin for plugin in usable if fnmatch(plugin.name, options.pattern) and options.kind in (None, plugin.kind)
    ]
    console = _console()
    grid = _table("name", "kind", "package", "version", "site", "signals", "paper, classes or content")
    for plugin in listed:
        sites, signals = ", ".join(plugin.sites), ", ".join(plugin.signals)
        _add(grid, plugin.name, plugin.kind, plugin.package, plugin.version, sites, signals, plugin.source)
    console.print(grid)
    _print_problems(console, problems)
    return SUCCESS


def _print_problems(console: Console, problems: Sequence[Problem]) -> None:
    if problems:
        console.print("\nnot usable:")
        grid = _table("name", "kind", "package and version", "reason")
        for problem in problems:
            _add(grid, problem.name, problem.kind, problem.origin, problem.reason)
        console.print(grid)


def _show(options: argparse.Namespace) -> int:
    registry = find(options.name, options.kind)
    plugin = registry.get(options.name)
    console = _console()
    place = f"{plugin.__module__}:{plugin.__qualname__}"
    console.print(f"{options.name}: a {registry.kind} of {registry.origin(options.name)}, {place}\n", markup=False)
    console.print(_documentation(plugin), markup=False)
    settings = knobs(plugin)
    facts = {
        "paper": getattr(plugin, "paper", ""),
        "parity": getattr(plugin, "parity", ""),
        "content": getattr(plugin, "description", ""),
        "classes": ", ".join(getattr(plugin, "classes", ())),
        "sites": ", ".join(hosted(plugin)) if issubclass(plugin, ModelFamily) else "",
    }
    if registry.kind == "reducer" and (reducer := example(options.name, plugin)) is not None:
        sites, signals = described(reducer)
        facts |= {"sites": ", ".join(sites), "signals": ", ".join(signals)}
    console.print()
    for fact, value in facts.items():
        if value:
            console.print(f"{fact:<8} {value}", markup=False)
    if settings:
        grid = _table("knob", "type", "default", "meaning")
        for knob in settings:
            _add(grid, knob.name, knob.type, "(required)" if knob.default is None else knob.default, knob.meaning)
        console.print("", grid)
    if settings and (found := presets(registry.kind, options.name)):
        grid = _table("preset", "sets")
        for preset, values in found.items():
            _add(grid, preset, ", ".join(f"{knob}={value!r}" for knob, value in values.items()))
        console.print("", grid)
    return SUCCESS


def _documentation(plugin: type) -> str:
    lines = (plugin.__doc__ or "It has no docstring.").strip("\n").splitlines()
    first, *rest = lines
    margin = min((len(line) - len(line.lstrip()) for line in rest if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:] for line in rest)]).rstrip()


def _check(options: argparse.Namespace) -> int:
    registry = find(options.name, options.kind)
    values = dict(_knob(argument) for argument in options.knobs)
    console = _console()
    verdict: list[Finding] = []
    print(f"{options.name}: a {registry.kind} of {registry.origin(options.name)}, interface {INTERFACE}\n")
    for finding in findings(registry, options.name, values, options.model):
        verdict.append(finding)
        style = {FAILED: "bold red"}.get(finding.outcome, "green" if not finding.detail else "yellow")
        detail = f"\n{'':<9}{finding.detail}" if finding.detail else ""
        console.print(f"[{style}]{finding.outcome:<8}[/] {escape(finding.what)}[dim]{escape(detail)}[/]")
    broken = sum(finding.outcome == FAILED for finding in verdict)
    print(f"\n{broken} of {len(verdict)} checks failed" if broken else f"\nall {len(verdict)} checks passed")
    return BROKEN_PROMISE if broken else SUCCESS


def _knob(argument: str) -> tuple[str, Any]:
    name, equals, value = argument.partition("=")
    if not equals:
        raise ValueError(f"{argument!r} sets no knob: write KNOB=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{argument!r} has no readable value: write KNOB=VALUE as in a configuration file") from error


def _new(options: argparse.Namespace) -> int:
    folder = create_package(options.name, options.output)
    print(f"made {folder}; next:\n")
    print(f"  pip install -e {folder}")
    print(f"  pytest {folder}")
    print(f"  python -m tokenreduce.catalog check {options.name}")
    print(f"  python -m tokenreduce reducer={options.name}")
    return SUCCESS


def _table_in_markdown(options: argparse.Namespace) -> int:
    print(TABLES[options.of]())
    return SUCCESS


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def _table(*columns: str) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")  # a name that is cut short cannot be copied
    return grid


def _add(grid: Table, *cells: str) -> None:
    grid.add_row(*map(escape, cells))


if __name__ == "__main__":
    sys.exit(main())
