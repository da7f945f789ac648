"""CMAI, Cross-Modality Attention Inhibition (arXiv 2411.15453): text does not see what it does not need.

The authors published no code. A constant of theirs that is not known is a knob without a default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokenreduce.reducer import AtDecoder, Geometry, Layer, Positions, Selection, Span, Step, TokenReducer, VisualTokens
from tokenreduce.signals import DecoderAttention


@dataclass(frozen=True, kw_only=True)
class Cmai(TokenReducer):
    """Hide from every word the visual tokens that it does not focus on; all stay, so no compute is saved.

    threshold: the focus below which a word no longer attends to a visual token; not known of the paper.
    layer:     the first layer in which it does not, by the attention of the layer before; not known.

    A word's focus on a visual token is what the words that it attends to pay that token: text-to-text attention times
    text-to-image attention, both of the text behind the visual tokens, of one softmax over the whole sequence, and
    averaged over heads. It is taken once, for all layers that follow; this and the heads are ours. What is generated
    does not see what the prompt's last word does not see. Preset: cmai_neutral, a choice of ours.
    """

    paper = "2411.15453"
    parity = "worked example and plain loops; no official code"

    positions: Positions = "original"
    threshold: float
    layer: Layer

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtDecoder(layer=self.layer, sees=(DecoderAttention(geometry.decoder_layer(self.layer) - 1),))]

    def count(self, step: Step, span: Span) -> int:
        return span.current

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention = tokens[step.sees[0]]
        text, length = attention.text, attention.keys.shape[1]
        visual = torch.arange(length, device=text.device)[attention.visual]
        focus = attention.mean(text, text) @ attention.mean(text, visual)
        sight = torch.zeros(length, length, dtype=torch.int8, device=text.device)
        sight[text[:, None], visual] = -(focus < self.threshold).to(sight.dtype)
        return replace(tokens.everything(), sight=sight)
