"""YOPO (arXiv 2410.06169): visual tokens need less of the language model's attention than text does.

The reference is the official code. Its masks are here; its pruned heads and feed-forward networks, which rest on the
authors' files and weights, are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.reducer import (
    AtDecoder,
    Geometry,
    Layer,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    blocks,
)
from tokenreduce.signals import DecoderAttention


@dataclass(frozen=True, kw_only=True)
class Yopo(TokenReducer):
    """Let visual tokens see their neighbours alone, and text none in deep layers; all stay, so no compute is saved.

    radius: how many rows and columns around it a visual token sees, later ones too; the official attncut_w is
            one more than twice that. None for no such bound.
    layer:  the first layer with that bound; the official code has it in all, and here it begins behind the first.
    cut:    the first layer in which no text sees visual tokens: 20 of 40 in the official code for LLaVA-1.5-13B, 24 of
            28 for Qwen2-VL.

    Text is hidden from before the softmax, as in the official code for Qwen2-VL. That for LLaVA takes the probabilities
    away behind it, which is right for the authors' fine-tuned weights alone. Neighbours are within a tile, frame or
    picture. For real savings in deep layers use ``vtw``.
    """

    paper = "2410.06169"
    parity = "worked example and plain loops; no official vectors"

    positions: Positions = "original"
    radius: int | None = 2
    layer: Layer = 1
    cut: Layer = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius is not None and self.radius < 0:
            raise ValueError(f"radius={self.radius}: a visual token sees at least itself, with a radius of 0")

    def steps(self, geometry: Geometry) -> list[Step]:
        layers = [self.cut] if self.radius is None else [self.layer, self.cut]
        return [
            AtDecoder(layer=layer, stage=stage, sees=(DecoderAttention(geometry.decoder_layer(layer) - 1),))
            for stage, layer in enumerate(layers, start=2 - len(layers))
        ]

    def count(self, step: Step, span: Span) -> int:
        return span.current

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention = tokens[step.sees[0]]
        places = torch.arange(attention.keys.shape[1], device=attention.keys.device)
        visual = places[attention.visual]
        sight = torch.zeros(len(places), len(places), dtype=torch.int8, device=places.device)
        if step.stage == 0:
            for some in blocks(torch.arange(len(tokens), device=places.device), len(tokens)):
                sight[visual[some, None], visual] = self.neighbourhood(tokens, some)
        else:
            sight[:, visual] = -1
            sight[visual] = 0
        return replace(tokens.everything(), sight=sight)

    def neighbourhood(self, tokens: VisualTokens, some: Tensor) -> Tensor:
        """1 where one of the ``some`` (k,) and a visual token are neighbours, -1 where they are not, 0 where one is a
        special token: ``(k, n)`` int8."""
        places = tokens.coordinates.short()
        apart = (places[some, None] - places).abs().amax(dim=-1)
        near = (apart <= (self.radius or 0)) & (tokens.tile[some, None] == tokens.tile)
        special = (tokens.tile < 0) | (tokens.place < 0)
        return (2 * near.to(torch.int8) - 1).masked_fill(special[some, None] | special, 0)
