"""Showing a video's frames to a reducer that sees all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce.passage import checked
from tokenreduce.reducer import Geometry, Grid, Selection, Span, Step, Tile, TokenReducer, VisualTokens

from .golden import GEOMETRY, stored


def film(count: int, size: int, geometry: Geometry = GEOMETRY) -> Span:
    """A video of ``count`` frames of ``size`` tokens each."""
    return Span(geometry, (Tile(Grid(1, size), role="frame"),) * count, count * size, count * size)


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

    tokens = VisualTokens(
        features.flatten(0, 1),
        span,
        reducer.count(step, span),
        tile=torch.arange(frames).repeat_interleave(size),
        place=torch.arange(size).repeat(frames),
        signals=look,
    )
    return checked(reducer, step, tokens)


def received(scores: Tensor) -> list[Any]:
    """For every frame attention by which its tokens receive ``scores`` (frames, n) on average over all queries."""
    size = scores.shape[1]
    return [stored(row.expand(1, size, size), slice(0, size)) for row in scores]
