"""VTW, Visual Tokens Withdrawal (arXiv 2405.05803): deep layers of the language model do not need the picture at all.

Published layers: 15 (the official class) and 16 (its command line) of 32 for LLaVA-1.5-7B, 20 for the others; a ratio
of depth carries over. The published thresholds of the search are 0.003 (LLaVA-1.5-7B), 0.0005 (LLaVA-1.5-13B) and
0.0001 (LLaVA-1.6-7B), over 20 samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from tokenreduce.reducer import AtDecoder, Geometry, Keep, Layer, NextLogits, Positions, Span, Step, TokenReducer


@dataclass(frozen=True)
class Vtw(TokenReducer):
    """Withdraw all visual tokens from some layer of the language model on.

    layer: the first layer that sees none; ``tokenreduce.calibrate(model, "vtw", samples)`` finds one for a model.

    The official code takes one image and withdraws it; here the tokens of all images of a prompt go.
    """

    paper = "2405.05803"
    parity = "official vectors, 2 end to end, 2 of the search"

    positions: Positions = field(default="original", kw_only=True)
    layer: Layer = 0.5

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtDecoder(layer=self.layer)]

    def count(self, step: Step, span: Span) -> int:
        return 0

    def with_keep(self, keep: Keep) -> Vtw:
        """``keep`` is the share of the layers that see the picture."""
        if isinstance(keep, int):
            raise TypeError("VTW keeps all visual tokens for some of the layers: give a ratio")
        return replace(self, layer=min(keep, math.nextafter(1, 0)))

    def calibrated(  # type: ignore[override]  # the settings of this search, by name
        self,
        next_logits: NextLogits,
        samples: Sequence[Any],
        geometry: Geometry,
        *,
        threshold: float = 0.003,
        first: int = 5,
    ) -> Vtw:
        """The earliest withdrawal that leaves a model's answers alone.

        ``first`` is the first layer tried, 5 in the official code; the one taken is the first whose divergence,
        averaged over ``samples``, is at most ``threshold``. Raises ``ValueError`` where there is none, or nothing to
        try.
        """
        layers = range(first, geometry.decoder_layers)
        if not layers or not samples:
            raise ValueError(
                f"nothing to search: {len(samples)} samples, and layers from first={first} on in a model of "
                f"{geometry.decoder_layers}"
            )
        mean = torch.stack([divergences(next_logits, sample, layers) for sample in samples]).mean(dim=0)
        for layer, divergence in zip(layers, mean.tolist(), strict=True):
            if divergence <= threshold:
                return replace(self, layer=layer)
        raise ValueError(
            f"no layer from {first} on keeps the mean divergence within {threshold}: the least is {mean.min():.2g}"
        )


def divergences(next_logits: NextLogits, sample: Any, layers: Sequence[int]) -> Tensor:
    """How far withdrawing at each of ``layers`` moves the next token's distribution: KL(withdrawn || full),
    ``(layers,)``."""
    full = next_logits(sample, None).float().log_softmax(-1)
    withdrawn = [next_logits(sample, Vtw(layer=layer)).float().log_softmax(-1) for layer in layers]
    return torch.stack([kl_div(full, each, reduction="sum", log_target=True) for each in withdrawn])
