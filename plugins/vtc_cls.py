"""VTC-CLS (arXiv 2412.05819): keep the tokens that the class token attends to over the last encoder layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.reducer import AtEncoderOutput, AtProjector, Geometry, Keep, Layer, ScoreReducer, Step, VisualTokens
from tokenreduce.signals import EncoderAttention


@dataclass(frozen=True)
class VtcCls(ScoreReducer):
    """Keep the tokens that the class token attends to most, summed over several layers of the vision encoder.

    ``start`` is the first of those layers; the last of them is the encoder's penultimate one. -4, three layers, is the
    paper's; the official command line defaults to -8. In an encoder without class token, which the method does not
    cover, the attention that tokens receive from all tokens takes its place. It acts before the projector, as
    published, unless that makes one token of several patches: then it acts behind it, on the mean over a token's
    patches. Presets: vtc_cls_64, vtc_cls_128 and vtc_cls_256, the published budgets.
    """

    paper = "2412.05819"
    parity = "official vectors, 5 cases; 3 on a real tower"

    keep: Keep = 1 / 9
    start: Layer = -4

    def steps(self, geometry: Geometry) -> list[Step]:
        depth = geometry.encoder_layers
        layers = range(geometry.encoder_layer(self.start), depth - 1)
        if not layers:
            raise ValueError(f"start={self.start} is the last of {depth} encoder layers, which never counts: lower it")
        site = AtEncoderOutput if geometry.patches_per_token == 1 else AtProjector
        return [site(keep=self.keep, sees=tuple(EncoderAttention(layer) for layer in layers))]

    def score(self, tokens: VisualTokens) -> Tensor:
        (step,) = self.steps(tokens.span.geometry)
        return torch.stack([tokens[attention].received() for attention in step.sees]).sum(dim=0)
