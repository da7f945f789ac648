"""HoloV (arXiv 2510.02912): every stretch of the picture keeps as many tokens as it is attended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.reducer import AtProjector, Geometry, Keep, Layer, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.signals import EncoderAttention


@dataclass(frozen=True)
class HoloV(TokenReducer):
    """Cut a picture into crops, share ``keep`` out among them, and keep the most attended tokens of each.

    crops: how many stretches of the sequence, which are no boxes of the grid; the first ones are a token longer where
           lengths differ.
    alpha: how much the variance of a crop's likenesses counts beside its attention. The official code scales both to
           the same mean, so that it hardly changes a share; tokens are chosen by attention alone.
    layer: the encoder layer whose attention from the class token is read.

    This is the official code for LLaVA; the paper's boxes and choice by diversity are not in it. Tokens go on crop by
    crop, the most attended first, and in raster order where a crop stays whole. A crop that is granted more tokens than
    it has loses the rest: as in the official code rows of zeros at the end make up for them. All tiles of a picture
    share one budget. In an encoder without class token the attention that tokens receive from all tokens takes its
    place, as in the official code for Qwen2.5-VL, which differs in the layer, -1, and in its number of crops,
    ``max(1, int(16 / 9 * tokens / keep))``. Presets: holov_64, holov_128 and holov_192, the published budgets.
    """

    paper = "2510.02912"
    parity = "official vectors, 4 cases"
    merges = True

    keep: Keep = 1 / 9
    crops: int = 16
    alpha: float = 0.09
    layer: Layer = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops < 1:
            raise ValueError(f"crops={self.crops} is no number of crops: it must be at least 1")

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(EncoderAttention(self.layer),), scope="picture", ordered=True)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention = torch.cat([view.received() for view in tokens.each(step.sees[0])])
        features, total = tokens.features, len(tokens)
        sizes = [size for size in crop_sizes(total, self.crops) if size]
        crops = zip(attention.split(sizes), features.float().split(sizes), strict=True)
        granted = shares(torch.stack([worth(*crop, self.alpha) for crop in crops]), tokens.keep)

        size = torch.tensor(sizes, device=granted.device)
        crop = torch.arange(len(sizes), device=granted.device).repeat_interleave(size, output_size=total)
        whole = granted >= size
        ranked = attention.masked_fill(whole[crop], 0).argsort(descending=True, stable=True)
        ranked = ranked[crop[ranked].argsort(stable=True)]
        rank = torch.arange(total, device=crop.device) - (size.cumsum(0) - size)[crop]
        picked = ranked[rank < granted[crop]]

        missing = tokens.keep - len(picked)
        index = torch.cat([picked, picked.new_full((missing,), -1)])
        if not missing:
            return Selection(index)
        source = torch.full_like(tokens.index, -1)
        source[picked] = torch.arange(len(picked), device=picked.device)
        return Selection(index, torch.cat([features[picked], features.new_zeros(missing, features.shape[1])]), source)


def crop_sizes(total: int, crops: int) -> list[int]:
    """The lengths of ``crops`` stretches of ``total`` tokens."""
    return [total // crops + (crop < total % crops) for crop in range(crops)]


def worth(attention: Tensor, features: Tensor, alpha: float) -> Tensor:
    """A crop's score, from its attention ``(tokens,)`` and features ``(tokens, dim)``."""
    others = len(attention) - 1
    if not others:
        return attention.mean()  # a single token's is not scaled, in the official code
    unit = features / (features.norm(dim=1, keepdim=True) + 1e-6)
    likeness = (unit @ unit.T).fill_diagonal_(0)
    mean = likeness.sum(dim=1, keepdim=True) / others
    variance = (likeness - mean).square().sum(dim=1) / others  # the empty diagonal counts, in the official code
    scaled = 1000 * attention
    return (scaled + alpha * variance * (scaled.abs().mean() / (variance.abs().mean() + 1e-6))).mean()


def shares(scores: Tensor, count: int) -> Tensor:
    """``count`` tokens, shared out in proportion to ``scores`` (crops,); those left over go to the highest ones."""
    weights = scores / (scores.sum() + 1e-6)
    granted = (weights * count).floor().long()
    rank = weights.argsort(descending=True, stable=True).argsort()
    return granted + (rank < count - granted.sum())
