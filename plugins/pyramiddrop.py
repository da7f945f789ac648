"""PyramidDrop (arXiv 2410.17247): the deeper the layer of the language model, the fewer visual tokens it needs.

The reference is the official inference code. Its published setting is the default: after layers 8, 16 and 24 of 32, a
half, a quarter and an eighth of the tokens; the settings behind the paper's 192, 128 and 64 tokens were never
published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tokenreduce.reducer import (
    AtDecoder,
    Geometry,
    Keep,
    Layer,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    check_keep,
)
from tokenreduce.signals import DecoderAttention, LookAheadAttention, Signal


@dataclass(frozen=True)
class PyramidDrop(TokenReducer):
    """At a few depths of the language model, keep the visual tokens that the prompt's last token is about to look at.

    layers: where tokens are dropped: how many layers have run before each drop.
    ratios: what each drop leaves, of the tokens that entered the language model; at least one token.
    ranks:  whose attention: that which the ``next`` layer would pay (the official code), or that which the ``last``
            layer paid (the paper's text).

    The official code takes one image and full multi-head attention; here the tokens of all images of a prompt compete,
    and grouped keys are repeated.
    """

    paper = "2410.17247"
    parity = "official vectors, 4 cases; 2 end to end"

    layers: tuple[Layer, ...] = (0.25, 0.5, 0.75)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    ranks: Literal["next", "last"] = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != len(self.ratios):
            raise ValueError(f"layers={self.layers} and ratios={self.ratios}: give one ratio for every layer")
        if list(self.ratios) != sorted(self.ratios, reverse=True):
            raise ValueError(f"ratios={self.ratios} are of the tokens that entered, so they cannot grow")
        for ratio in self.ratios:
            check_keep(float(ratio))

    def steps(self, geometry: Geometry) -> list[Step]:
        def ranking(layer: Layer) -> Signal:
            return LookAheadAttention() if self.ranks == "next" else DecoderAttention(geometry.decoder_layer(layer) - 1)

        return [AtDecoder(layer=layer, stage=stage, sees=(ranking(layer),)) for stage, layer in enumerate(self.layers)]

    def count(self, step: Step, span: Span) -> int:
        return max(1, int(span.entered * self.ratios[step.stage]))  # without a tolerance, as the official code

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(tokens.best(tokens[step.sees[0]].mean(-1)[0]))

    def with_keep(self, keep: Keep) -> PyramidDrop:
        """``keep`` is the paper's lambda: what every drop leaves of what the one before it left."""
        if isinstance(keep, int):
            raise TypeError("PyramidDrop drops in several layers, each a share of what is there: give a ratio")
        return replace(self, ratios=tuple(keep ** (drop + 1) for drop in range(len(self.layers))))
