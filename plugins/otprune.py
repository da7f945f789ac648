"""OTPrune (arXiv 2602.20205): the tokens whose second moments follow those of the whole picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Selection, Step, TokenReducer, VisualTokens


@dataclass(frozen=True)
class OtPrune(TokenReducer):
    """Keep the tokens that together span most of the picture's distribution, picked greedily by log-determinant.

    The kernel is the identity plus ``gamma`` times the square of the tokens' inner products, after every channel, and
    not every token, is divided by its norm over the picture. ``keep`` is rounded half to even; ratio 0.098 keeps 56 of
    576. All tiles of a picture share it. Everything is in float32, whatever the model's type, where the official code
    keeps a part in that; a channel of zeros stays one, where it gives NaN; and newlines are not among the tokens.

    order: ``raster`` by default. ``official`` is the order in which Python goes through a set of the picks, in which
           the official code hands them to the language model.

    Presets: otprune_r098, the official ratio, and otprune_r098_official, which also has the official order.
    """

    paper = "2602.20205"
    parity = "official vectors, 5 cases"

    keep: Keep = 0.098
    gamma: float = 0.01
    order: Literal["raster", "official"] = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma <= 0:
            raise ValueError(f"gamma={self.gamma} tells no tokens apart: it must be above 0")

    def steps(self, geometry: Geometry) -> list[Step]:
        ordered = self.order == "official"
        return [AtProjector(keep=self.keep, rounding="even", scope="picture", ordered=ordered)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        picks = spanning(normalize(tokens.features.float(), dim=0), tokens.keep, self.gamma)
        if self.order == "raster":
            return Selection(picks.sort().values)
        return Selection(picks.new_tensor(list(set(picks.tolist()))))


def spanning(rows: Tensor, count: int, gamma: float) -> Tensor:
    """The places of ``count`` of the ``rows`` (tokens, dim), in the order in which greedy MAP inference picks them.

    The kernel of their squared inner products is never formed: its rows are products of two smaller matrices.
    """
    if len(rows) <= rows.shape[1]:
        left = right = rows @ rows.T
    else:
        left, right = rows @ (rows.T @ rows), rows
    variance = 1 + gamma * torch.einsum("nd, nd -> n", left, right)
    factor = rows.new_zeros(count, len(rows))
    picked = torch.empty(count, dtype=torch.long, device=rows.device)
    for step in range(count):
        pick = variance.argmax(keepdim=True)
        picked[step : step + 1] = pick
        row = gamma * (right @ left[pick][0]) - factor[:step, pick][:, 0] @ factor[:step]
        factor[step] = row / variance[pick].sqrt()
        variance = (variance - factor[step].square()).index_fill(0, pick, -torch.inf)
    return picked
