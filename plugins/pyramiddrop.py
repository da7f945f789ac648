"""PyramidDrop (arXiv 2410.17247): the deeper the layer of the language model, the fewer visual tokens it needs.

The reference is the official inference code. Its published setting is the default: after layers 8, 16 and 24 of 32, a
half, a quarter and an eighth of the tokens; the settings behind the paper's 192, 128 and 64 tokens were never
published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
    best,
    check_keep,
    layer_index,
)
from tokenreduce.signals import DecoderAttention, LookAheadAttention


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

    paper: ClassVar[str] = "2410.17247"
    parity: ClassVar[str] = "official vectors, 4 cases; 2 end to end"

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
        depth = geometry.decoder_layers
        signals = [
            LookAheadAttention() if self.ranks == "next" else DecoderAttention(layer_index(layer, depth) - 1)
            for layer in self.layers
        ]
        return [
            AtDecoder(layer=layer, keep=float(ratio), sees=(signal,))
            for layer, ratio, signal in zip(self.layers, self.ratios, signals, strict=True)
        ]

    def count(self, step: Step, span: Span) -> int:
        return max(1, int(span.entered * (step.keep or 0)))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(best(tokens[step.sees[0]].mean(-1)[0], tokens.keep))

    def with_keep(self, keep: Keep) -> PyramidDrop:
        """``keep`` is the paper's lambda: what every drop leaves of what the one before it left."""
        if isinstance(keep, int):
            raise TypeError("PyramidDrop drops in several layers, each a share of what is there: give a ratio")
        return replace(self, ratios=tuple(keep ** (drop + 1) for drop in range(len(self.layers))))
