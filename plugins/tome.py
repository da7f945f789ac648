"""ToMe, Token Merging (arXiv 2210.09461): in every encoder block, merge the most similar pairs; and Turbo (2407.11717),
which spares those that mean most."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
    blocks,
    merge,
)
from tokenreduce.signals import Attention, EncoderAttention


@dataclass(frozen=True)
class ToMe(TokenReducer):
    """In every encoder block up to the features, merge the pairs of most similar tokens.

    The authors wrote it for classifiers. Here merging is spread evenly over the blocks, as many a block as ``keep``
    needs with a smaller last one, and the tokens that are left go to the projector in raster order (each where the
    odd token of its first pair stood), which the official code loses. A block merges half of its tokens at most, so a
    shallow encoder may leave more than ``keep``.

    per_block:    pairs merged in a block, the paper's r; None for as many as ``keep`` needs.
    proportional: whether a merged token weighs in attention as the tokens that it holds.
    Presets: tome_64, tome_128 and tome_192, the budgets at which papers compare with it.
    """

    paper = "2210.09461"
    parity = "official vectors, 5 cases"
    merges = True

    keep: Keep = 1 / 3
    per_block: int | None = None
    proportional: bool = True

    def steps(self, geometry: Geometry) -> list[Step]:
        merging: list[Step] = [
            AtEncoder(layer=layer, stage=layer, where="attention", keep=self.keep, sees=(EncoderAttention(layer),))
            for layer in range(geometry.feature_layer + 1)
        ]
        return [*merging, AtEncoderOutput()]

    def count(self, step: Step, span: Span) -> int:
        if step.behind_encoder:
            return span.current
        target, layers = span.keep(self.keep), span.geometry.feature_layer + 1
        merges = math.ceil((span.entered - target) / layers) if self.per_block is None else self.per_block
        return min(span.current, max(target, span.current - min(merges, span.current // 2)))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        ones = torch.ones(len(tokens), device=tokens.features.device)
        places, sizes = (ones.long().cumsum(0) - 1, ones) if tokens.carried is None else tokens.carried
        if step.behind_encoder:
            return Selection(places.argsort())
        attention = tokens[step.sees[0]]
        metric = attention.keys.float().mean(dim=0)[attention.visual]
        merges, class_token = len(tokens) - tokens.keep, attention.class_token is not None
        index, source = match(metric, merges, class_token, self.loss(step.stage, attention))
        size = merge(sizes[:, None], source, len(index), "sum")
        merged = merge(sizes[:, None] * tokens.features, source, len(index), "sum") / size
        size, merged = size[:, 0], merged.to(tokens.features.dtype)
        carry = places[index], size
        return Selection(index, merged, source, size=size if self.proportional else None, carry=carry)

    def loss(self, block: int, attention: Attention) -> Tensor | None:
        """What merging each token ``(n,)`` into another in a block loses, on the scale of cosines; None for nothing."""
        return None


@dataclass(frozen=True)
class Turbo(ToMe):
    """ToMe that spares the tokens that the class token attends to.

    A pair is merged for its likeness less the semantic value of the token that is given up, which is ``alpha`` x
    ``beta`` ** abs(``gamma`` - block) x 30 x the class token's attention to it, the mean over heads. The 30 is the
    official code's; the paper also weighs the other token of the pair. In an encoder without class token, which the
    authors do not cover, the mean of what all tokens attend to stands in.

    alpha, beta, gamma: as above, by default those of the official scripts; blocks are counted from 0.
    threshold: sequences shorter than this, class token included, are merged no further. It is 40 in the official code,
               which would keep smaller budgets out of reach.

    The other knobs are ToMe's, and so is the raster order. The official code is of BLIP, without a budget.
    Presets: turbo_r30 and turbo_r40, what its scripts merge in a block.
    """

    paper = "2407.11717"
    parity = "worked example and a plain loop; no official vectors"

    alpha: float = 5.0
    beta: float = 1.0
    gamma: float = 0.0
    threshold: int = 0

    def count(self, step: Step, span: Span) -> int:
        if span.current + span.geometry.class_token < self.threshold:
            return span.current
        return super().count(step, span)

    def loss(self, block: int, attention: Attention) -> Tensor:
        return self.alpha * self.beta ** abs(self.gamma - block) * 30 * attention.received()


def match(metric: Tensor, merges: int, class_token: bool, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: which token each output row stands for, and the output row of every token.

    Tokens at even places of the encoder's sequence are merged into those at odd places. A class token has place 0
    there, is not in ``metric`` (tokens, dim), and is never merged. ``loss`` (tokens,) is taken off the
    likeness by which a token is merged into another.
    """
    unit, first = normalize(metric, dim=-1), int(class_token)
    places = torch.arange(len(metric), device=metric.device)
    even, odd = places[first::2], places[1 - first :: 2]
    nearest = [(unit[some] @ unit[odd].T).max(dim=-1) for some in blocks(even, len(odd))]
    likeness, partner = (torch.cat(each) for each in zip(*nearest, strict=True))
    gain = likeness if loss is None else likeness - loss[even]
    order = gain.sort(descending=True, stable=True).indices
    merged, unmerged = order[:merges], order[merges:]
    if class_token:
        unmerged = unmerged.sort().values
    source = torch.empty_like(places)
    source[even[unmerged]] = places[: len(unmerged)]
    source[odd] = places[: len(odd)] + len(unmerged)
    source[even[merged]] = partner[merged] + len(unmerged)
    return torch.cat([even[unmerged], odd]), source
