"""Visual tokens made by hand, to try a reducer's ``select`` on without a model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from tokenreduce.reducer import Count, Geometry, Grid, Span, Tile, VisualTokens


def visual_tokens(
    features: Tensor,
    keep: Count = None,
    *,
    grid: Grid | None = None,
    signals: Mapping[Hashable, Any] | None = None,
    geometry: Geometry | None = None,
) -> VisualTokens:
    """One picture's tokens as a step shows them.

    features: ``(n, dim)``.
    keep:     how many to keep; a range, or None, for an adaptive step.
    grid:     their layout; by default a single row.
    signals:  what ``tokens[signal]`` gives.
    geometry: the model's; by default LLaVA-1.5-7B's.

    >>> import torch
    >>> len(visual_tokens(torch.zeros(12, 8), keep=3, grid=Grid(3, 4)))
    12
    """
    grid = grid or Grid(1, len(features))
    if len(grid) != len(features):
        raise ValueError(f"{grid} has {len(grid)} places for {len(features)} tokens")
    geometry = geometry or Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
    span = Span(geometry, (Tile(grid),), len(features), len(features))
    given = signals or {}
    return VisualTokens(features, span, keep, signals=(lambda signal: [given[signal]]) if given else None)
