"""PruMerge and PruMerge+ (arXiv 2403.15388): as many tokens as stand out, and the others added to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtEncoderOutput, Geometry, Layer, Selection, Step, TokenReducer, VisualTokens, blocks
from tokenreduce.signals import Attention, EncoderAttention


@dataclass(frozen=True)
class PruMerge(TokenReducer):
    """Keep the patches whose class-token attention is an outlier, and add their nearest neighbours to them.

    Adaptive: the picture decides how many. Attention is that of one head of the full width, and each kept patch gets
    the sum of its neighbours weighted by raw attention (the paper: an average). One more row holds the weighted sum
    of all patches that were not kept, if any, which the paper does not mention. Rows come in the order of their scores,
    the extra one last, as in the official code, or with ``order="raster"`` in the picture's. Outliers are those of one
    image, where the official code pools a batch. In an encoder without class token, which the authors do not cover, the
    mean of all queries' attention takes its place.

    layer:      the encoder layer that is looked at; the features are the model's own.
    factor:     how many interquartile ranges above the third quartile an outlier begins.
    neighbours: how many patches are added to each.
    """

    paper = "2403.15388"
    parity = "official vectors, 3 cases; 2 on a real tower"
    merges = True

    layer: Layer = -1
    factor: float = 1.5
    neighbours: int = 32
    order: Literal["score", "raster"] = "score"

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtEncoderOutput(sees=(EncoderAttention(self.layer),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention = tokens[EncoderAttention(self.layer)]
        weights, features = full_width(attention), tokens.features.float()
        low, high = torch.quantile(weights, weights.new_tensor([0.25, 0.75]))
        outliers = int((weights > high + self.factor * (high - low)).sum())
        ranked = weights.sort(descending=True, stable=True).indices[:outliers]
        kept = torch.cat([ranked, self.spread(ranked, len(tokens))])
        if self.order == "raster":
            kept = kept.sort().values

        unit = normalize(rearrange(attention.keys.float(), "h n d -> n (h d)")[attention.visual], dim=-1)
        grown = []
        for some in blocks(kept, len(tokens)):
            likeness = (unit[some] @ unit.T).scatter(1, some[:, None], -torch.inf)
            nearest = likeness.topk(min(self.neighbours, len(tokens) - 1)).indices
            adding = torch.zeros_like(likeness).scatter(1, nearest, weights[nearest])
            grown.append(features[some] + adding @ features)
        extra = weights.index_fill(0, kept, 0)[None] @ features

        source = torch.full_like(weights, len(kept), dtype=torch.long)
        source[kept] = torch.arange(len(kept), device=kept.device)
        rows = torch.cat([*grown, extra]).to(tokens.features.dtype)
        index = torch.cat([kept, kept.new_tensor([-1])])
        return Selection(index[: len(tokens)], rows[: len(tokens)], source)  # where all are kept nothing is left over

    def spread(self, outliers: Tensor, total: int) -> Tensor:
        """Patches that are kept besides the outliers."""
        return outliers[:0]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge that also keeps a stride over the picture, the denser the more patches stand out.

    The stride leaves out the last patch of the picture, as in the official code; without outliers there is none.
    """

    parity = "official vectors, 1 case"

    def spread(self, outliers: Tensor, total: int) -> Tensor:
        if not len(outliers):
            return outliers
        stride = int(int(1 / (len(outliers) / total)) / 3)  # outliers are at most a quarter of all: 1 or more
        grid = torch.arange(0, total - 1, max(1, stride), device=outliers.device)
        return grid[~torch.isin(grid, outliers)]


def full_width(attention: Attention) -> Tensor:
    """The class token's attention to the patches ``(tokens,)``, all heads taken as one wide head."""
    queries, keys = (rearrange(each, "h n d -> 1 n (h d)") for each in (attention.queries, attention.keys))
    scale = keys.shape[-1] ** -0.5
    return Attention(queries, keys, keys, scale, attention.visual, attention.class_token).received()
