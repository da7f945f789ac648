"""DART, Duplication-Aware Reduction of Tokens (arXiv 2502.11494): drop what repeats, not what seems unimportant.

Published presets for LLaVA-1.5: budgets of 192, 128 (the default, as a ratio of 576) and 64 tokens, 320 for LLaVA-NeXT;
with the pivots 4 more are kept: 196, 132, 68 and 324.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import (
    AtDecoder,
    Geometry,
    Keep,
    Layer,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.signals import DecoderAttention, DecoderHidden


@dataclass(frozen=True)
class Dart(TokenReducer):
    """Inside the language model, keep a few pivots and the visual tokens that are least like them.

    keep:         the budget. Each pivot takes ``keep`` // (``image_pivots`` + ``text_pivots``) tokens, and the image
                  pivots come on top.
    layer:        the first layer that sees fewer tokens.
    image_pivots, text_pivots: how many visual tokens, and tokens of the text behind them, are pivots: those with the
                  largest keys.
    order:        the pivots' turns: as a Python ``set`` of their places iterates (the official code), or ``ascending``,
                  image before text.

    Where the official code stops with an error this one goes on: with fewer text tokens than ``text_pivots`` the pivots
    there are share what the missing ones would take, and no more tokens are taken than there are.
    """

    paper = "2502.11494"
    parity = "official vectors, 5 cases; 2 end to end"

    positions: Positions = field(default="original", kw_only=True)
    keep: Keep = 128 / 576
    layer: Layer = 2
    image_pivots: int = 4
    text_pivots: int = 4
    order: Literal["set", "ascending"] = "set"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise ValueError(
                f"image_pivots={self.image_pivots}, text_pivots={self.text_pivots}: there is at least one image pivot"
            )

    def steps(self, geometry: Geometry) -> list[Step]:
        keys = DecoderAttention(geometry.decoder_layer(self.layer) - 1)
        return [AtDecoder(layer=self.layer, keep=self.keep, sees=(keys, DecoderHidden(normed=True)))]

    def count(self, step: Step, span: Span) -> int:
        pivots = self.image_pivots + self.text_pivots
        each = span.keep(self.keep) // pivots
        return min(span.current, self.image_pivots + pivots * each)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention, hidden = tokens[step.sees[0]], tokens[DecoderHidden(normed=True)]
        sizes = attention.keys.float().abs().sum(dim=(0, 2))
        visual = torch.arange(len(sizes), device=sizes.device)[attention.visual]
        image = largest(visual, sizes, min(self.image_pivots, tokens.keep))
        text = largest(attention.text, sizes, self.text_pivots)
        turns = list({*image, *text}) if self.order == "set" else [*sorted(image), *sorted(text)]

        directions = normalize(hidden.float(), dim=-1)
        likeness = directions[turns] @ directions[visual].T
        kept = torch.isin(visual, torch.tensor(image, device=visual.device))
        for like, quota in zip(likeness, shares(tokens.keep - len(image), len(turns)), strict=True):
            kept[like.masked_fill(kept, torch.inf).sort(stable=True).indices[:quota]] = True
        return Selection(kept.nonzero()[:, 0])


def largest(places: Tensor, sizes: Tensor, count: int) -> list[int]:
    """The ``count`` places of the largest ``sizes``, largest first."""
    return places[sizes[places].sort(descending=True, stable=True).indices[:count]].tolist()


def shares(total: int, parts: int) -> Sequence[int]:
    """``total`` in ``parts`` as equal as can be, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
