"""LLaVolta (arXiv 2406.20092): its visual context compressor, which averages neighbouring visual tokens.

The reference is the official code. The paper trains with it in stages; its released models are tested without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
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


@dataclass(frozen=True)
class Llavolta(TokenReducer):
    """After some layers of the language model, average every few neighbouring visual tokens.

    stride: how many tokens make one. They are neighbours in raster order, so that a row's end may go with the next
            row's beginning; what is left over at a picture's end is lost. ``pool`` averages in two dimensions.
    layer:  the paper's K, how many layers have run; 0 is before the language model, with ``positions="compact"`` the
            official K = -1.

    An average stands at the mean of its tokens' positions, rounded down. Beyond 1024 the official code rounds to even,
    as it computes them in half precision. Of fewer than ``stride`` tokens, of which it leaves none, all make one.
    Each tile is pooled by itself, which the official code does not cover. Presets: llavolta_heavy (the default) and
    llavolta_light.
    """

    paper = "2406.20092"
    parity = "worked examples and a plain loop; no official vectors"
    merges = True

    positions: Positions = field(default="original", kw_only=True)
    stride: int = 8
    layer: Layer = 2 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise ValueError(f"stride={self.stride}: at least one token makes one")

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtDecoder(layer=self.layer, scope="tile") if geometry.decoder_layer(self.layer) else AtProjector()]

    def count(self, step: Step, span: Span) -> int:
        return max(1, span.current // self.stride)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        stride, places = min(self.stride, len(tokens)), torch.arange(len(tokens), device=tokens.features.device)
        runs = tokens.features[: tokens.keep * stride].unflatten(0, (tokens.keep, stride))
        into = places // stride
        return Selection(
            places[: tokens.keep] * stride + (stride - 1) // 2,
            runs.float().mean(dim=1).to(runs.dtype),
            into.masked_fill(into >= tokens.keep, -1),
        )

    def with_keep(self, keep: Keep) -> Llavolta:
        """``keep`` is one over the stride."""
        if isinstance(keep, int):
            raise TypeError("LLaVolta makes one token of every few: give a ratio")
        return replace(self, stride=math.ceil(1 / keep - 1e-6))
