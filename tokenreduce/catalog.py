"""``python -m tokenreduce.catalog``: the installed reducers as a Markdown table, made from the reducers themselves."""

from __future__ import annotations

from collections.abc import Iterable

from tokenreduce.reducer import Geometry, Grid, Span, TokenReducer
from tokenreduce.registry import REDUCERS
from tokenreduce.signals import DecoderAttention, DecoderHidden, LookAheadAttention, TextEmbeddings

LLAVA = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
"""LLaVA-1.5-7B, which the published settings are for."""

GRID = Grid(24, 24)
TEXT = (DecoderAttention, DecoderHidden, LookAheadAttention, TextEmbeddings)
SITES = {
    "AtInput": "input",
    "AtEncoder": "inside the encoder",
    "AtEncoderOutput": "encoder output",
    "AtProjector": "projector",
    "AtDecoder": "language model",
}
HEADER = (
    "| reducer | what it does | paper | site | sees | text-aware | adaptive | merges | positions | checked against |"
)


def row(name: str, reducer: TokenReducer) -> str:
    """One line of the table."""
    steps = reducer.steps(LLAVA)
    sites = _unique(SITES[type(step).__name__] for step in steps)
    signals = _unique(type(signal).__name__ for step in steps for signal in step.sees)
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
    """All reducers that can be made with their defaults."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for name, reducer in sorted(REDUCERS.usable().items()):
        if name != "chain":
            lines.append(row(name, reducer()))
    return "\n".join(lines)


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:1].isdigit() else paper


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    print(table())
