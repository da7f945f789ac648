"""Videos made by hand, shown to a reducer as a step of a whole picture sees them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenreduce.passage import checked
from tokenreduce.reducer import Geometry, Grid, Role, Selection, Span, Step, Tile, TokenReducer, VisualTokens

from .golden import GEOMETRY, stored


def film(count: int, size: int, geometry: Geometry = GEOMETRY, grid: Grid | None = None, role: Role = "frame") -> Span:
    """A video of ``count`` frames of ``size`` tokens each, or as many tiles of another ``role``."""
    return Span(geometry, (Tile(grid or Grid(1, size), role=role),) * count, count * size, count * size)


def show_film(
    reducer: TokenReducer,
    step: Step,
    features: Tensor,
    signals: Mapping[Hashable, Sequence[Any]] | None = None,
    span: Span | None = None,
) -> Selection:
    """What a step chooses of frames with ``features`` (frames, n, dim); ``signals`` has a value for every frame. Holds
    the reducer to its count."""
    frames, size = features.shape[:2]
    span = film(frames, size) if span is None else span
    assert step.scope == "picture"

    def look(signal: Hashable) -> Sequence[Any]:
        assert signal in step.sees, f"{signal} was not declared"
        return (signals or {})[signal]

    frame, place = numbers(features)
    count = reducer.count(step, span)
    tokens = VisualTokens(features.flatten(0, 1), span, count, tile=frame, place=place, signals=look)
    return checked(reducer, step, tokens)


def kept(
    reducer: TokenReducer,
    frames: Tensor,
    grid: Grid | None = None,
    *,
    role: Role = "frame",
    signals: Mapping[Hashable, Any] | None = None,
) -> list[int]:
    """Which tokens of a video ``(frames, tokens, dim)`` the only step of a reducer keeps, as many as it promised;
    ``signals`` has one value for all of them."""
    (step,) = reducer.steps(GEOMETRY)
    span = film(len(frames), frames.shape[1], grid=grid, role=role)
    values = {signal: [value] for signal, value in (signals or {}).items()}
    index: list[int] = show_film(reducer, step, frames, values, span).index.tolist()
    assert index == sorted(set(index))
    return index


def numbers(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The frame, and the place in it, of every token of a video ``(frames, tokens, dim)``."""
    frame, place = frames.new_ones(frames.shape[:2]).nonzero().unbind(-1)
    return frame, place


def received(scores: Tensor) -> list[Any]:
    """For every frame attention by which its tokens receive ``scores`` (frames, n) on average over all queries."""
    size = scores.shape[1]
    return [stored(row.expand(1, size, size), slice(0, size)) for row in scores]
