"""VisPruner (arXiv 2412.01818v2): what the class token attends to, and of the rest what is least alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Layer, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.signals import EncoderAttention, EncoderHidden


@dataclass(frozen=True)
class VisPruner(TokenReducer):
    """Keep the tokens that the class token attends to most, and of the others those that are least alike.

    ``keep`` counts both; of a picture that is cut up every tile keeps as many. ``important_ratio`` is the share of it,
    rounded down, that goes to attention. The other tokens are thinned out, up to eight at a time: they stand in the
    order of attention and every second one is compared with those between; the ones with the nearest likeness are
    dropped, and the rest of them, nearest first, go in front of those between. ``layer`` is the encoder layer of both
    attention and features; likeness is the cosine of the encoder's features, not the projected ones.

    The official code stops with an error where an odd number of tokens is thinned out, or where fewer than eight pairs
    are left. Here an odd one out is compared too, and never more are dropped than there are pairs. In an encoder
    without class token, which the authors do not cover, the attention that tokens receive from all tokens takes its
    place; where a token is made of several patches, their means count. Presets: vispruner_128, vispruner_64 and
    vispruner_32, the published budgets, and vispruner_64_r75, the official example's share of attention.
    """

    paper = "2412.01818v2"
    parity = "official vectors, 4 cases"

    keep: Keep = 1 / 9
    important_ratio: float = 0.5
    layer: Layer = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important_ratio <= 1:
            raise ValueError(f"important_ratio={self.important_ratio} is no share: it must be from 0 to 1")

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(EncoderAttention(self.layer), EncoderHidden(self.layer)))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention, features = (tokens[signal] for signal in step.sees)
        important = int(tokens.keep * self.important_ratio)
        ranked = attention.received().argsort(descending=True, stable=True)
        least_alike = thinned(features, ranked[important:], tokens.keep - important)
        return Selection(torch.cat([ranked[:important], least_alike]).sort().values)


def thinned(features: Tensor, places: Tensor, count: int) -> Tensor:
    """The ``count`` of ``places`` (n,) that are left of the rows of ``features`` when the most alike are dropped."""
    if not count:
        return places[:0]
    unit = normalize(features.float(), dim=-1)
    cosines = unit @ unit.T
    while len(places) > count:
        compared, between = places[::2], places[1::2]
        dropped = min(8, len(places) - count, len(between))
        outside = torch.full_like(cosines[0], -torch.inf).index_fill_(0, between, 0)
        nearest = torch.cat([(cosines[rows] + outside).amax(dim=1) for rows in compared.split(64)])
        places = torch.cat([compared[nearest.argsort(descending=True, stable=True)[dropped:]], between])
    return places
