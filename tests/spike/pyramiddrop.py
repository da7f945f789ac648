"""PyramidDrop, arXiv 2410.17247."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.reducer import AtDecoder, Geometry, Layer, ScoreReducer, Span, Step, VisualTokens
from tokenreduce.signals import LookAheadAttention


@dataclass(frozen=True)
class PyramidDrop(ScoreReducer):
    """At a few depths of the language model, keep what the prompt's last token is about to attend to."""

    layers: tuple[Layer, ...] = (0.25, 0.5, 0.75)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)

    def steps(self, geometry: Geometry) -> list[Step]:
        return [
            AtDecoder(layer=layer, keep=ratio, sees=(LookAheadAttention(),))
            for layer, ratio in zip(self.layers, self.ratios, strict=True)
        ]

    def count(self, step: Step, span: Span) -> int:
        return max(1, int(span.entered * (step.keep or 0)))

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens[LookAheadAttention()].mean(-1)[0]
