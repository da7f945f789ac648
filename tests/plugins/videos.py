"""Videos made by hand, shown to a reducer as a step of a whole picture sees them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from tokenreduce.reducer import Grid, Role, Span, Tile, TokenReducer, VisualTokens

from .golden import GEOMETRY


def kept(
    reducer: TokenReducer,
    frames: Tensor,
    grid: Grid | None = None,
    *,
    role: Role = "frame",
    signals: Mapping[Hashable, Any] | None = None,
) -> list[int]:
    """Which tokens of a video ``(frames, tokens, dim)`` the only step of a reducer keeps, as many as it promised."""
    (step,) = reducer.steps(GEOMETRY)
    assert step.scope == "picture"
    tile = Tile(grid or Grid(1, frames.shape[1]), role=role)
    features = frames.flatten(0, 1)
    span = Span(GEOMETRY, (tile,) * len(frames), len(features), len(features))
    frame, place = numbers(frames)

    def look(signal: Hashable) -> list[Any]:
        assert signal in step.sees, f"{signal} was not declared"
        return [(signals or {})[signal]]

    count = reducer.count(step, span)
    tokens = VisualTokens(features, span, count, tile=frame, place=place, signals=look)
    index = reducer.select(step, tokens).index.tolist()
    least, most = tokens.bounds or (0, len(features))
    assert least <= len(index) <= most
    assert index == sorted(set(index))
    return index


def numbers(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The frame, and the place in it, of every token of a video ``(frames, tokens, dim)``."""
    frame, place = frames.new_ones(frames.shape[:2]).nonzero().unbind(-1)
    return frame, place
