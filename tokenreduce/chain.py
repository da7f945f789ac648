"""Reducers one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from tokenreduce.reducer import (
    Count,
    Geometry,
    Keep,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.registry import REDUCERS


@dataclass(frozen=True)
class Chain(TokenReducer):
    """Several reducers, each on what the one before it left.

    ``reducers`` holds instances, or mappings of a ``name`` and knobs, whose sites must follow the order of the
    model. Each
    keeps its own position policy. Behind the vision encoder a ratio is one of what the reducer before it left;
    inside the language model it is one of all that entered there.
    """

    reducers: tuple[Any, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "compact":
            raise ValueError(f"positions={self.positions!r}: every reducer of a chain has its own; set it there")
        if not self.reducers:
            raise ValueError("a chain of no reducers: name at least one, or use the reducer 'none'")
        object.__setattr__(self, "reducers", tuple(_member(each) for each in self.reducers))

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        each = (reducer.steps(geometry) for reducer in self.reducers)
        return [replace(step, member=number) for number, steps in enumerate(each) for step in steps]

    def count(self, step: Step, span: Span) -> Count:
        return self.reducers[step.member].count(step, _as_entered(step, span))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        tokens.span = _as_entered(step, tokens.span)
        return self.reducers[step.member].select(step, tokens)

    def positions_after(self, step: Step) -> Positions:
        return self.reducers[step.member].positions_after(step)

    def with_positions(self, positions: Positions) -> Chain:
        return replace(self, reducers=tuple(reducer.with_positions(positions) for reducer in self.reducers))

    def with_keep(self, keep: Keep) -> Chain:
        """The last reducer's knob is turned; those before it stay as they are."""
        *others, last = self.reducers
        return replace(self, reducers=(*others, last.with_keep(keep)))

    def parts(self) -> Sequence[TokenReducer]:
        return list(chain.from_iterable(reducer.parts() for reducer in self.reducers))

    def knobs(self) -> dict[str, Any]:
        return {"reducers": [{"name": REDUCERS.name_of(reducer), **reducer.knobs()} for reducer in self.reducers]}


def _as_entered(step: Step, span: Span) -> Span:
    """The span as a later reducer of the chain sees it: what is there now is what entered."""
    return replace(span, entered=span.current) if step.member > 0 and step.behind_encoder else span


def _member(each: Any) -> TokenReducer:
    if isinstance(each, TokenReducer):
        return each
    if not isinstance(each, Mapping) or "name" not in each:
        raise ValueError(
            f"{each!r} is no reducer of a chain: give a name and knobs, such as {{name: fastv, keep: 0.5}}"
        )
    return REDUCERS.create(**each)
