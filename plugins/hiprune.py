"""HiPrune (arXiv 2508.00553): what a middle encoder layer looks at, what is around it, and what a deep one looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenreduce.reducer import (
    AtProjector,
    Count,
    Geometry,
    Keep,
    Layer,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.signals import EncoderAttention


@dataclass(frozen=True)
class HiPrune(TokenReducer):
    """Keep what a middle encoder layer attends to, its neighbours on the grid, and what a deep layer attends to.

    alpha:        the share of ``keep`` that goes to the tokens that receive most attention in the middle layer, each
                  with its four neighbours; what is left goes to those that receive most in the deep one. A fifth of
                  that share is rounded half to even, and so is a ratio ``keep``.
    middle_layer: an encoder layer; the official ``object_layer`` 9 of 24 counts from 1 and is the default.
    deep_layer:   an encoder layer.
    attention:    whether what a token receives is a ``mean`` over all queries or a ``sum``. Tokens that are kept
                  already are told apart by subtracting 1 in the deep layer, which is the most that a mean can be, so
                  ``keep`` tokens stay. A sum can be more: then such a token is counted twice, and fewer stay. That is
                  what the official code does for Qwen2.5-VL, and the mean what it does for LLaVA.

    As in the official code the neighbours of a token at the left or right edge are in the rows above and below, and a
    neighbour above the grid is its first token, one below its last. The grid is the picture's own, where the code for
    LLaVA has 24 rows and columns; several pictures are reduced one by one, where that for Qwen2.5-VL takes them
    together. If neighbours are more than ``keep``, which the official code stops at, those stay that receive most in
    the middle layer. Presets: hiprune_192, hiprune_128 and hiprune_64 are the published budgets for LLaVA;
    hiprune_qwen_334, hiprune_qwen_223 and hiprune_qwen_112 those for Qwen2.5-VL, with its layers, sums and positions.
    """

    paper = "2508.00553"
    parity = "official vectors, 4 cases; 4 of the code for Qwen2.5-VL"

    keep: Keep = 1 / 9
    alpha: float = 0.1
    middle_layer: Layer = 8 / 24
    deep_layer: Layer = -2
    attention: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is no share: it must be from 0 to 1")

    def steps(self, geometry: Geometry) -> list[Step]:
        layers = (self.middle_layer, self.deep_layer)
        return [AtProjector(keep=self.keep, rounding="even", sees=tuple(map(EncoderAttention, layers)))]

    def count(self, step: Step, span: Span) -> Count:
        kept = span.keep(self.keep, step.rounding)
        return kept if self.attention == "mean" else ((kept + 1) // 2, kept)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        (_, keep), grid = tokens.bounds or (0, 0), tokens.span.grid
        views = [tokens[signal] for signal in step.sees]
        middle, deep = (view.received(slice(None)) for view in views)
        anchors = tokens.place[tokens.best(middle, round(keep * self.alpha / 5))]
        beside = torch.tensor([0, -1, 1, -grid.width, grid.width], device=anchors.device)
        near = torch.isin(tokens.place, (anchors[:, None] + beside).clamp(0, len(grid) - 1))
        if self.attention == "sum":
            keep -= again(deep * views[1].queries.shape[1], near, keep)
        return Selection(tokens.best(torch.where(near, 1 + deep.max() + middle, deep), keep))


def again(deep: Tensor, near: Tensor, keep: int) -> int:
    """How many tokens that are ``near`` anchors are among the best of ``deep`` once more, although lowered by 1."""
    ranked = (deep - near.float()).argsort(descending=True, stable=True)
    return int(near[ranked[: max(0, keep - int(near.sum()))]].sum())
