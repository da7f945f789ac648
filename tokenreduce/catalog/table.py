"""The README's tables of reducers and of model families, made from these themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tokenreduce import signals as interface
from tokenreduce.attach import sites
from tokenreduce.attach.views import DecoderWatched, TowerWatched, Watched
from tokenreduce.catalog.description import GRID, LLAVA, described, example, site_name
from tokenreduce.models.family import ModelFamily
from tokenreduce.reducer import AtEncoder, Geometry, Span, Tile, TokenReducer
from tokenreduce.registry import BUILT_IN, MODELS, REDUCERS
from tokenreduce.signals import Signal, TokenSizes, Unseen

EXAMPLE = {"layer": 0, "clip": ""}
"""Values for the fields of signals that have no default."""

HEADER = (
    "| reducer | what it does | paper | site | sees | text-aware | adaptive | merges | positions | checked against |"
)


def row(name: str, reducer: TokenReducer) -> str:
    """One line of the table."""
    steps = reducer.steps(LLAVA)
    at, signals = described(reducer)
    text = any(signal.text for step in steps for signal in step.sees)
    span = Span(LLAVA, (Tile(GRID),), len(GRID), len(GRID))
    adaptive = bool(steps) and not isinstance(reducer.count(steps[-1], span), int)
    cells = (
        f"`{name}`",
        reducer.summary(),
        _link(reducer.paper),
        ", ".join(at) or "none",
        ", ".join(f"`{signal}`" for signal in signals),
        "yes" if text else "no",
        "yes" if adaptive else "no",
        "yes" if reducer.merges else "no",
        reducer.positions,
        reducer.parity,
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All built-in reducers, with their defaults or as their first preset makes them."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for name, plugin in sorted(REDUCERS.usable().items()):
        if name != "chain" and REDUCERS.package(name) == BUILT_IN and (reducer := example(name, plugin)) is not None:
            lines.append(row(name, reducer))
    return "\n".join(lines)


def models_table() -> str:
    """All built-in model families: what they host, why they host nothing else, and the signals at each site."""
    header = ["family", "class", *(site.name for site in sites.SITES), "signals before the language model", "why not"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, family in sorted(MODELS.usable().items()):
        if MODELS.package(name) == BUILT_IN:
            lines.append(_family_row(name, family))
    inside = ", ".join(_shown(DecoderWatched, LLAVA))
    return "\n".join([*lines, "", f"Signals inside the language model, in every family: {inside}."])


def _family_row(name: str, family: type[ModelFamily]) -> str:
    reasons = "; ".join(f"{site_name(step)}: {reason}" for step, reason in family.unhosted.items())
    classes = ", ".join(f"`{each}`" for each in family.classes)
    shown = _shown(TowerWatched, replace(LLAVA, class_token=family.class_token))
    signals = ", ".join(each for each in shown if family.hosts(AtEncoder) or each != f"`{TokenSizes.__name__}`")
    hosted = ["yes" if family.hosts(site.kind) else "" for site in sites.SITES]
    return f"| {' | '.join([f'`{name}`', classes, *hosted, signals, reasons])} |"


def _shown(site: type[Watched], geometry: Geometry) -> list[str]:
    """The signals of the interface that a site shows of a model of this geometry."""
    family: Any = SimpleNamespace(geometry=geometry, attention_layer=int)
    names = []
    for name, kind in vars(interface).items():
        if isinstance(kind, type) and issubclass(kind, Signal) and kind is not Signal:
            fields = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
            try:
                kind(**{each: EXAMPLE[each] for each in fields}).watch(site(family, processor=True))
            except Unseen:
                continue
            names.append(f"`{name}`")
    return names


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:1].isdigit() else paper
