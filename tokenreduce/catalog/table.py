"""The README's table of reducers, made from the reducers themselves."""

from __future__ import annotations

from tokenreduce.catalog.description import GRID, LLAVA, described
from tokenreduce.reducer import Span, TokenReducer
from tokenreduce.registry import BUILT_IN, REDUCERS
from tokenreduce.signals import DecoderAttention, DecoderHidden, LookAheadAttention, QuestionLikeness, TextEmbeddings

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


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:1].isdigit() else paper
