"""A reducer around another one, which does all that the other does: the base of those that look at its selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenreduce.reducer import Count, Geometry, Positions, Selection, Span, Step, TokenReducer, VisualTokens


@dataclass(frozen=True)
class Wrapped(TokenReducer):
    """Another reducer, as it is."""

    inner: TokenReducer

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return self.inner.steps(geometry)

    def count(self, step: Step, span: Span) -> Count:
        return self.inner.count(step, span)

    def positions_after(self, step: Step) -> Positions:
        return self.inner.positions_after(step)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return self.inner.select(step, tokens)
