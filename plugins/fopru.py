"""FoPru, Focal Pruning (arXiv 2411.14164): keep what the vision encoder itself attends to.

The authors published no code. What the paper leaves open is settled here as follows: the class token's row and column
are left out without renormalising, variances are population variances in float32, a tie goes to the attention given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from tokenreduce.reducer import AtProjector, Geometry, Keep, Layer, Rounding, ScoreReducer, Span, Step, VisualTokens
from tokenreduce.signals import Attention, EncoderAttention


def significance(attention: Attention, include_cls: bool = False) -> Tensor:
    """How much each visual token matters to the encoder, ``(tokens,)``, from attention averaged over heads.

    Either the attention that tokens receive (column means) or the attention that they give (row means): whichever
    varies more over the tokens. With ``include_cls`` the means run over the class token too; rows then sum to 1, so
    that all tokens give the same and only what they receive tells them apart; likewise in an encoder without one.
    """
    if include_cls or attention.class_token is None:
        return attention.received(slice(None))
    received, given = attention.marginals()
    return received if received.var(correction=0) > given.var(correction=0) else given


@dataclass(frozen=True)
class FoPruRank(ScoreReducer):
    """Keep the tokens that matter most to the vision encoder's own attention, wherever they are."""

    paper = "2411.14164"
    parity = "worked examples; no official code"

    keep: Keep = 0.25
    layer: Layer = -2
    include_cls: bool = False
    rounding: Rounding = "floor"

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, rounding=self.rounding, sees=(EncoderAttention(self.layer),))]

    def score(self, tokens: VisualTokens) -> Tensor:
        return significance(tokens[EncoderAttention(self.layer)], self.include_cls)


@dataclass(frozen=True)
class FoPruRow(ScoreReducer):
    """Keep the whole rows of the patch grid that matter most to the vision encoder's own attention.

    ``keep`` is rounded to the nearest number of rows, half a row up, and at least one; so the count may differ from it.
    """

    paper = "2411.14164"
    parity = "worked examples; no official code"

    keep: Keep = 0.25
    layer: Layer = -2
    include_cls: bool = False

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(EncoderAttention(self.layer),))]

    def count(self, step: Step, span: Span) -> int:
        height, width = span.grid.height, span.grid.width
        rows = self.keep / width if isinstance(self.keep, int) else self.keep * height
        return width * min(height, max(1, math.floor(rows + 0.5 + 1e-6)))

    def score(self, tokens: VisualTokens) -> Tensor:
        scores = significance(tokens[EncoderAttention(self.layer)], self.include_cls)
        rows = rearrange(scores, "(row column) -> row column", column=tokens.span.grid.width)
        return rows.mean(dim=1).repeat_interleave(tokens.span.grid.width)
