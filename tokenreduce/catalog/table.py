"""The README's tables of reducers and of model families, made from these themselves."""

from __future__ import annotations

from collections.abc import Sequence

from tokenreduce.attach.decoder import DECODER_SIGNALS
from tokenreduce.attach.vision import VISION_SIGNALS
from tokenreduce.catalog.description import GRID, LLAVA, SITES, described, site_name
from tokenreduce.models.family import ModelFamily
from tokenreduce.reducer import AtEncoder, Span, TokenReducer
from tokenreduce.registry import BUILT_IN, MODELS, REDUCERS
from tokenreduce.signals import (
    ClassToken,
    DecoderAttention,
    DecoderHidden,
    LookAheadAttention,
    QuestionLikeness,
    TextEmbeddings,
    TokenSizes,
)

TEXT = (DecoderAttention, DecoderHidden, LookAheadAttention, QuestionLikeness, TextEmbeddings)
HEADER = (
    "| reducer | what it does | paper | site | sees | text-aware | adaptive | merges | positions | checked against |"
)


def row(name: str, reducer: TokenReducer) -> str:
    """One line of the table."""
    steps = reducer.steps(LLAVA)
    sites, signals = described(reducer)
    text = any(isinstance(signal, TEXT) for step in steps for signal in step.sees)
    span = Span(LLAVA, (GRID,), len(GRID), len(GRID))
    adaptive = bool(steps) and reducer.count(steps[-1], span) is None
    cells = (
        f"`{name}`",
        reducer.summary(),
        _link(reducer.paper),
        ", ".join(sites) or "none",
        ", ".join(f"`{signal}`" for signal in signals),
        "yes" if text else "no",
        "yes" if adaptive else "no",
        "yes" if reducer.merges else "no",
        reducer.positions,
        reducer.parity,
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All built-in reducers that can be made with their defaults."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for name, reducer in sorted(REDUCERS.usable().items()):
        if name != "chain" and REDUCERS.package(name) == BUILT_IN:
            lines.append(row(name, reducer()))
    return "\n".join(lines)


def models_table() -> str:
    """All built-in model families: what they host, why they host nothing else, and the signals at each site."""
    header = ["family", "class", *SITES.values(), "signals before the language model", "why not"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, family in sorted(MODELS.usable().items()):
        if MODELS.package(name) == BUILT_IN:
            lines.append(_family_row(name, family))
    return "\n".join([*lines, "", f"Signals inside the language model, in every family: {_named(DECODER_SIGNALS)}."])


def _family_row(name: str, family: type[ModelFamily]) -> str:
    reasons = "; ".join(f"{site_name(step)}: {reason}" for step, reason in family.unhosted.items())
    classes = ", ".join(f"`{each}`" for each in family.classes)
    absent: dict[type, bool] = {ClassToken: not family.class_token, TokenSizes: not family.hosts(AtEncoder)}
    signals = _named([each for each in VISION_SIGNALS if not absent.get(each)])
    sites = ["yes" if family.hosts(site) else "" for site in SITES]
    return f"| {' | '.join([f'`{name}`', classes, *sites, signals, reasons])} |"


def _named(signals: Sequence[type]) -> str:
    return ", ".join(f"`{signal.__name__}`" for signal in signals)


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:1].isdigit() else paper
