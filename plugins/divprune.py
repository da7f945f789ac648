"""DivPrune (arXiv 2503.02175): keep the tokens that are as different from one another as possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.reducer import AtProjector, Geometry, Keep, Selection, Step, TokenReducer, VisualTokens


def diverse(features: Tensor, count: int) -> Tensor:
    """The places of ``count`` rows of ``features`` (tokens, dim) in the order of picking: first the row whose nearest
    other row is farthest in cosine distance, then always the one farthest from its nearest row picked before."""
    cosines = products(features)
    inverse = cosines.diagonal().clamp(min=torch.finfo(cosines.dtype).tiny).rsqrt()
    cosines *= inverse
    cosines *= inverse[:, None]
    nearest = cosines.fill_diagonal_(-torch.inf).amax(dim=0)
    cosines.fill_diagonal_(torch.inf)  # once picked, never again
    picked = [nearest.argmin(keepdim=True)]
    (nearest,) = cosines[picked[0]]
    while len(picked) < count:
        picked.append(nearest.argmin(keepdim=True))
        nearest = torch.maximum(nearest, cosines[picked[-1]][0])
    return torch.cat(picked)


def products(rows: Tensor) -> Tensor:
    """The inner product of every two rows ``(n, dim)``: ``(n, n)``."""
    if rows.device.type != "cpu" or rows.numel() < 1 << 17:  # small ones are done before NumPy's threads are awake
        return rows @ rows.T
    # Of a matrix times its own transpose NumPy computes one half, by BLAS's `syrk`, for which torch has no call.
    array = rows.detach().numpy()
    return torch.from_numpy(array @ array.T)


@dataclass(frozen=True)
class DivPrune(TokenReducer):
    """Keep the tokens that are most different from one another, picked greedily by cosine distance.

    ``keep`` is rounded half to even, as published; ratio 0.098 keeps 56 of 576. Distances are in float32 whatever the
    model's type, and no token is picked twice, where the official code repeats one when only duplicates are left.
    Presets: divprune_r098 (the official ratio), divprune_64, divprune_128 and divprune_192.
    """

    paper = "2503.02175"
    parity = "official vectors, 7 cases"

    keep: Keep = 0.098

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, rounding="even")]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(diverse(tokens.features.float(), tokens.keep).sort().values)
