"""EfficientVLA (arXiv 2506.10100): the selection of visual tokens of a method for vision-language-action models.

The authors' code could not be had; the reference is the paper. Its layer pruning and its cache for a diffusion head are
no token reduction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from tokenreduce.reducer import AtDecoder, Geometry, Keep, Layer, Positions, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.signals import DecoderAttention


@dataclass(frozen=True, kw_only=True)
class EfficientVla(TokenReducer):
    """Inside the language model, keep what the instruction attends to, and what is least like the best of that.

    keep:  the paper's K_final, by default its 56 of 256.
    key:   K_key, how many tokens of most relevance are compared with; the paper says 4 to 8.
    alpha: the share of all others that is taken by relevance; the rest goes by distance to the key tokens. Not known.
    layer: the first layer that sees fewer tokens; the layer before it ranks them. Not known.

    Relevance is the sum over the text behind the visual tokens of its attention to each, the mean over heads; without
    such text, the last token's attention. Distance is one minus the largest cosine of states to a key token, and taken
    once: two that are alike may both be kept. The tokens of all images of a prompt compete, and keep their order.
    Presets: efficientvla_56 and efficientvla_112, the published numbers, with a choice of ours for what is not known.
    """

    paper = "2506.10100"
    parity = "worked example and plain loops; no official code"

    positions: Positions = "original"
    keep: Keep = 56 / 256
    key: int = 4
    alpha: float
    layer: Layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key < 1 or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"key={self.key}, alpha={self.alpha}: give at least one key token, and a share from 0 to 1"
            )

    def steps(self, geometry: Geometry) -> list[Step]:
        ranking = DecoderAttention(geometry.decoder_layer(self.layer) - 1)
        return [AtDecoder(layer=self.layer, keep=self.keep, sees=(ranking,))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention = tokens[step.sees[0]]
        relevance = attention.received(attention.text if len(attention.text) else -1)
        key = min(self.key, tokens.keep)
        relevant = key + math.floor(self.alpha * (tokens.keep - key) + 1e-6)

        ranked = relevance.sort(descending=True, stable=True).indices[:relevant]
        others = tokens.others(ranked)
        unit = normalize(tokens.features.float(), dim=-1)
        likeness = (unit[others] @ unit[ranked[:key]].T).amax(dim=1)
        diverse = others[tokens.best(-likeness, tokens.keep - relevant)]
        return Selection(torch.cat([ranked, diverse]).sort().values)
