"""FoPru, Focal Pruning (arXiv 2411.14164): keep what the vision encoder itself attends to.

The authors published no code. What the paper leaves open is settled here as follows: the class token's row and column
are left out without renormalising, variances are population variances in float32, a tie goes to the attention given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from tokenreduce.reducer import (
    AtProjector,
    Geometry,
    Keep,
    Layer,
    Rounding,
    ScoreReducer,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    best,
    tokens_to_keep,
)
from tokenreduce.signals import Attention, EncoderAttention


def significance(attention: Attention, include_cls: bool = False) -> Tensor:
    """How much each visual token matters to the encoder, ``(tokens,)``, from attention averaged over heads.

    Either the attention that tokens receive (column means) or the attention that they give (row means): whichever
    varies more over the tokens. With ``include_cls`` the means run over the class token too; rows then sum to 1, so
    that all tokens give the same and only what they receive tells them apart; likewise in an encoder without one.
    """
    if include_cls or attention.class_token is None:
        return attention.mean(queries=slice(None)).mean(dim=0)
    weights = attention.mean()
    received, given = weights.mean(dim=0), weights.mean(dim=1)
    return received if received.var(correction=0) > given.var(correction=0) else given


@dataclass(frozen=True)
class FoPruRank(ScoreReducer):
    """Keep the tokens that matter most to the vision encoder's own attention, wherever they are."""

    paper: ClassVar[str] = "2411.14164"
    parity: ClassVar[str] = "worked examples; no official code"

    keep: Keep = 0.25
    layer: Layer = -2
    include_cls: bool = False
    rounding: Rounding = "floor"

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(EncoderAttention(self.layer),))]

    def count(self, step: Step, span: Span) -> int:
        return tokens_to_keep(self.keep, span.entered, self.rounding)

    def score(self, tokens: VisualTokens) -> Tensor:
        return significance(tokens[EncoderAttention(self.layer)], self.include_cls)


@dataclass(frozen=True)
class FoPruRow(TokenReducer):
    """Keep the whole rows of the patch grid that matter most to the vision encoder's own attention.

    ``keep`` is rounded to the nearest number of rows, half a row up, and at least one; so the count may differ from it.
    """

    paper: ClassVar[str] = "2411.14164"
    parity: ClassVar[str] = "worked examples; no official code"

    keep: Keep = 0.25
    layer: Layer = -2
    include_cls: bool = False

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(EncoderAttention(self.layer),))]

    def count(self, step: Step, span: Span) -> int:
        width = span.grid.width
        rows = len(span.grid) // width
        if isinstance(self.keep, int):
            budget = tokens_to_keep(self.keep, len(span.grid))
            return max(1, (2 * budget + width) // (2 * width)) * width
        return tokens_to_keep(self.keep, rows, "round") * width

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        width = tokens.span.grid.width
        scores = significance(tokens[EncoderAttention(self.layer)], self.include_cls)
        row_scores = rearrange(scores, "(row column) -> row column", column=width).mean(dim=1)
        rows = best(row_scores, tokens.keep // width)
        columns = torch.arange(width, device=rows.device)
        return Selection(rearrange(rows[:, None] * width + columns, "row column -> (row column)"))
