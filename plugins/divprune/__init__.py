"""DivPrune (arXiv 2503.02175): keep the tokens that are as different from one another as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.reducer import AtProjector, Geometry, Keep, Selection, Span, Step, TokenReducer, VisualTokens


def diverse(features: Tensor, count: int, height: int = 192) -> Tensor:
    """The places of ``count`` rows of ``features`` (tokens, dim) in the order of picking: first the row whose nearest
    other row is farthest in cosine distance, then always the one farthest from its nearest row picked before.

    Only half of the symmetric matrix of cosines is computed, in bands of ``height`` rows that begin at the diagonal.
    """
    tokens = len(features)
    inverse = 1 / features.norm(dim=-1).clamp(min=torch.finfo(features.dtype).tiny)
    nearest = torch.full((tokens,), -torch.inf, dtype=features.dtype, device=features.device)  # as a cosine
    bands: list[Tensor] = []
    for start in range(0, tokens, height):
        # Lengths are divided out of the products: dividing the features would copy them.
        band = features[start : start + height] @ features[start:].T
        band *= inverse[start : start + height, None]
        band *= inverse[start:]
        band.diagonal().fill_(-torch.inf)
        nearest[start:] = torch.maximum(nearest[start:], band.amax(dim=0))
        nearest[start : start + height] = torch.maximum(nearest[start : start + height], band.amax(dim=1))
        band.diagonal().fill_(torch.inf)  # once picked, never again
        bands.append(band)

    def cosines(row: int) -> Tensor:
        own = row // height
        above = [band[:, row - number * height] for number, band in enumerate(bands[:own])]
        return torch.cat([*above, bands[own][row - own * height]])

    picked = [int(nearest.argmin())]
    nearest = cosines(picked[0])
    while len(picked) < count:
        picked.append(int(nearest.argmin()))
        torch.maximum(nearest, cosines(picked[-1]), out=nearest)
    return torch.tensor(picked, device=features.device)


@dataclass(frozen=True)
class DivPrune(TokenReducer):
    """Keep the tokens that are most different from one another, picked greedily by cosine distance.

    ``keep`` is rounded half to even, as published; ratio 0.098 keeps 56 of 576. Distances are in float32 whatever the
    model's type, and no token is picked twice, where the official code repeats one when only duplicates are left.
    Presets: divprune_r098 (the official ratio), divprune_64, divprune_128 and divprune_192.
    """

    paper: ClassVar[str] = "2503.02175"
    parity: ClassVar[str] = "official vectors, 7 cases"

    keep: Keep = 0.098

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep)]

    def count(self, step: Step, span: Span) -> int:
        if isinstance(self.keep, float):
            return max(1, round(self.keep * span.entered))
        return super().count(step, span) or 0

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(diverse(tokens.features.float(), tokens.keep).sort().values)
