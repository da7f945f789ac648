"""FastV (arXiv 2403.06764): after a few layers of the language model, half of the visual tokens are hardly looked at.

The reference is the official in-place code with a key-value cache: it ranks once, in prefill, and position ids keep
their gaps. Published presets: K=2 with R=50 % (the default), 75 % and 90 %, and K=3 with R=50 % and 75 %.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenreduce.reducer import AtDecoder, Geometry, Keep, Layer, Positions, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.signals import DecoderAttention


@dataclass(frozen=True)
class FastV(TokenReducer):
    """Inside the language model, keep the visual tokens that the prompt's last token attends to most.

    keep:    what is left; the paper's R is 1 - ``keep``. A ratio is rounded half to even, as the official code does.
    layer:   the paper's K, the first layer that sees fewer tokens; the layer before it ranks them.
    queries: who attends: the ``last`` token of the prompt (the official code) or ``all`` of them (the paper's text).

    The official code takes one image; here the tokens of all images of a prompt compete.
    """

    paper = "2403.06764"
    parity = "official vectors, 5 cases; 3 end to end"

    positions: Positions = field(default="original", kw_only=True)
    keep: Keep = 0.5
    layer: Layer = 2
    queries: Literal["last", "all"] = "last"

    def steps(self, geometry: Geometry) -> list[Step]:
        ranking = DecoderAttention(geometry.decoder_layer(self.layer) - 1)
        return [AtDecoder(layer=self.layer, keep=self.keep, rounding="even", sees=(ranking,))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(tokens.best(tokens[step.sees[0]].received(-1 if self.queries == "last" else slice(None))))
