"""FasterVLM (arXiv 2412.01818v1): keep the tokens that the class token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.reducer import AtProjector, Geometry, Keep, Layer, ScoreReducer, Step, VisualTokens
from tokenreduce.signals import EncoderAttention


@dataclass(frozen=True)
class FasterVlm(ScoreReducer):
    """Keep the tokens that the vision encoder's class token attends to most.

    ``keep`` is rounded to the nearest number of tokens, as the authors print it: ratio 0.25 keeps 144 of 576, 0.1
    keeps 58 and 0.05 keeps 29. Of a picture that is cut up every tile keeps as many. ``layer`` is the encoder layer
    whose attention is read, averaged over heads; -2 is the one that LLaVA's features come from.

    In an encoder without class token, which the authors do not cover, the attention that tokens receive from all
    tokens takes its place; where a token is made of several patches, their mean counts. Presets: fastervlm_144,
    fastervlm_58 and fastervlm_29, the published budgets.
    """

    paper = "2412.01818v1"
    parity = "official vectors, 4 cases"

    keep: Keep = 0.1
    layer: Layer = -2

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, rounding="round", sees=(EncoderAttention(self.layer),))]

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens[EncoderAttention(self.layer)].received()
