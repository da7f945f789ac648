"""DivPrune (arXiv 2503.02175): keep the tokens that are as different from one another as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Selection, Span, Step, TokenReducer, VisualTokens

_ROUNDING = 1e-6  # more than two ways of adding up one cosine differ by


def diverse(unit: Tensor, count: int) -> Tensor:
    """The places of ``count`` rows of ``unit`` (tokens, dim) in the order of picking: every pick is the row farthest,
    in cosine distance, from its nearest row picked before.

    The same as the plain recurrence over the matrix of all distances, without that matrix. Distances to the nearest
    pick only ever shrink, so old ones are upper bounds: as long as the best of a few candidates, among whom all
    distances are known, is above the old distances of all others, it is the next pick.
    """
    tokens = len(unit)
    picked = [loneliest(unit)]
    distance = torch.full((tokens,), torch.inf, device=unit.device)
    seen = 0
    while len(picked) < count:
        distance = torch.minimum(distance, 1 - (unit[picked[seen:]] @ unit.T).amax(dim=0))
        distance[picked] = -torch.inf
        seen = len(picked)
        order = distance.sort(descending=True, stable=True).indices
        width = max(32, tokens // 8)
        candidates = order[:width].sort().values  # in raster order: a tie goes to the token that comes first
        others = distance[order[width]] if width < tokens else distance.new_tensor(-torch.inf)
        among = 1 - unit[candidates] @ unit[candidates].T
        nearest = distance[candidates]
        best = nearest.argmax()
        while len(picked) < count and (len(picked) == seen or nearest[best] > others):
            picked.append(int(candidates[best]))
            nearest = torch.minimum(nearest, among[best])
            nearest[best] = -torch.inf
            best = nearest.argmax()
    return torch.tensor(picked, device=unit.device)


def loneliest(unit: Tensor, blocks: int = 12) -> int:
    """The row whose nearest other row is farthest.

    Rows are compared with one block of others after the other, and left out once somebody is nearer to them than the
    nearest one is to the best row known.
    """
    tokens = len(unit)
    places, rows = torch.arange(tokens, device=unit.device), unit  # those still in question
    nearest = torch.full((tokens,), -torch.inf, device=unit.device)  # the highest cosine so far
    bound = unit.new_tensor(torch.inf)
    for block in range(min(blocks, tokens)):
        probes = torch.arange(block, tokens, blocks, device=unit.device)
        cosines = rows @ unit[block::blocks].T
        nearest = torch.maximum(nearest, cosines.masked_fill_(places[:, None] == probes, -torch.inf).amax(dim=1))
        if block % 3 == 0:
            promising = places[nearest.argsort()[:8]]
            cosines = unit[promising] @ unit.T
            cosines.scatter_(1, promising[:, None], -torch.inf)
            bound = torch.minimum(bound, cosines.amax(dim=1).min() + _ROUNDING)
        alive = (nearest <= bound).nonzero()[:, 0]
        if len(alive) < 0.7 * len(places):  # leaving rows out means copying the others
            places, rows, nearest = places[alive], rows[alive], nearest[alive]
    return int(places[nearest.argmin()])


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
        unit = normalize(tokens.features.float(), dim=-1)
        return Selection(diverse(unit, tokens.keep).sort().values)
