"""ToMe, arXiv 2210.09461."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokenreduce.reducer import (
    AtEncoder,
    AtEncoderOutput,
    Geometry,
    Keep,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    layer_index,
    tokens_to_keep,
)
from tokenreduce.signals import EncoderAttention, TokenSizes


@dataclass(frozen=True)
class AtMerge(AtEncoder):
    """A step that knows among how many the merging is spread."""

    blocks: int = 1


@dataclass(frozen=True)
class ToMe(TokenReducer):
    """In every encoder block, merge the pairs of most similar tokens.

    merges:       merges a block; None for as many as ``keep`` needs when spread evenly.
    proportional: whether a merged token weighs in attention as the tokens that it holds.
    """

    keep: Keep = 0.25
    merges: int | None = None
    proportional: bool = True

    def steps(self, geometry: Geometry) -> list[Step]:
        blocks = layer_index(-2, geometry.encoder_layers) + 1
        merging = [
            AtMerge(self.keep, (EncoderAttention(layer), TokenSizes()), layer, "attention", blocks)
            for layer in range(blocks)
        ]
        return [*merging, AtEncoderOutput()]

    def count(self, step: Step, span: Span) -> int:
        if not isinstance(step, AtMerge):
            return span.current
        target = tokens_to_keep(self.keep, span.entered)
        merges = math.ceil((span.entered - target) / step.blocks) if self.merges is None else self.merges
        return max(target, span.current - min(merges, span.current // 2))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if not isinstance(step, AtMerge):
            return Selection(tokens.index.argsort())  # merging lost the raster order
        attention = tokens[step.sees[0]]
        metric = attention.keys.mean(dim=0)[attention.visual]
        index, source = match(metric, len(tokens) - self.count(step, tokens.span), attention.class_token is not None)
        weights = one_hot(source, len(index)).T * tokens[TokenSizes()]
        size = weights.sum(dim=1)
        return Selection(
            index, weights @ tokens.features / size[:, None], source, size=size if self.proportional else None
        )


def match(metric: Tensor, merges: int, class_token: bool) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: which token each output row stands for, and the output row of every token.

    Tokens at even places of the encoder's sequence are merged into those at odd places. A class token has place 0
    there, is not in ``metric`` (tokens, dim), and is never merged.
    """
    unit = metric / metric.norm(dim=-1, keepdim=True)
    first = int(class_token)
    even, odd = torch.arange(first, len(metric), 2), torch.arange(1 - first, len(metric), 2)
    likeness, partner = (unit[even] @ unit[odd].T).max(dim=-1)
    order = likeness.sort(descending=True, stable=True).indices
    merged, unmerged = order[:merges], order[merges:]
    if class_token:
        unmerged = unmerged.sort().values
    source = torch.empty(len(metric), dtype=torch.long)
    source[even[unmerged]] = torch.arange(len(unmerged))
    source[odd] = torch.arange(len(odd)) + len(unmerged)
    source[even[merged]] = partner[merged] + len(unmerged)
    return torch.cat([even[unmerged], odd]), source
