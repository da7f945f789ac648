"""VMTC, Visual-Modality Token Compression (arXiv 2411.15453): primary tokens, and clusters of all others.

The authors published no code. A constant of theirs that is not known is a knob without a default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from tokenreduce.reducer import (
    AtEncoderOutput,
    Geometry,
    Keep,
    Layer,
    Selection,
    Step,
    TokenReducer,
    VisualTokens,
    merge,
    tokens_to_keep,
)
from tokenreduce.signals import EncoderAttention


@dataclass(frozen=True, kw_only=True)
class Vmtc(TokenReducer):
    """Keep the patches that the class token attends to, and average clusters of the others, weighted by that attention.

    keep:       how many rows, the paper's P + C.
    clusters:   C, a number, or a share of ``keep``; not known of the paper.
    layer:      the layer of the vision encoder whose attention counts; not known.
    iterations: how often K-means assigns tokens to clusters; not known.
    seed:       of the first centres.

    K-means goes by cosine similarity. Its first centres, its empty clusters and the order of the rows are ours: centres
    are drawn as by k-means++, a cluster that lost all its tokens takes one that is least like its own centre, and a
    cluster's row stands where its most attended token did. In an encoder without class token, what all tokens attend to
    stands in. Preset: vmtc_neutral, a choice of ours for what is not known.
    """

    paper = "2411.15453"
    parity = "worked example and plain loops; no official code"
    merges = True

    keep: Keep = 0.25
    clusters: Keep
    layer: Layer
    iterations: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: tokens are assigned to clusters at least once")

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtEncoderOutput(keep=self.keep, sees=(EncoderAttention(self.layer),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        clusters = tokens_to_keep(self.clusters, tokens.keep)
        weights = tokens[EncoderAttention(self.layer)].received().clamp(min=torch.finfo(torch.float32).tiny)
        primary = tokens.best(weights, tokens.keep - clusters)
        others = tokens.others(primary)

        features = tokens.features[others].float()
        draws = torch.rand(clusters, len(others), generator=tokens.generator(self.seed)).to(features.device)
        cluster = k_means(normalize(features, dim=-1), draws, self.iterations)
        weight = weights[others, None]
        merged = merge(weight * features, cluster, clusters, "sum") / merge(weight, cluster, clusters, "sum")
        slots = others[(one_hot(cluster, clusters) * weight).argmax(dim=0)]

        index, order = torch.cat([primary, slots]).sort()
        source = torch.empty_like(tokens.index)
        source[primary] = torch.arange(len(primary), device=source.device)
        source[others] = len(primary) + cluster
        rows = torch.cat([tokens.features[primary], merged.to(tokens.features.dtype)])
        return Selection(index, rows[order], order.argsort()[source])


def k_means(unit: Tensor, draws: Tensor, iterations: int) -> Tensor:
    """The cluster ``(n,)`` of each of the unit vectors ``(n, dim)``, none of them empty, from uniform random numbers
    ``(clusters, n)``."""
    centres = unit[seeds(unit, draws)]
    cluster = assigned(unit @ centres.T)
    for _ in range(iterations - 1):
        centres = normalize(merge(unit, cluster, len(draws)), dim=-1)
        cluster = assigned(unit @ centres.T)
    return cluster


def seeds(unit: Tensor, draws: Tensor) -> Tensor:
    """The places of the first centres, each drawn with odds in proportion to how far, in 1 - cosine, a vector is from
    the nearest one drawn before."""
    picked: list[Tensor] = []
    odds = torch.full_like(unit[:, 0], 2)
    for row in draws:
        # The least of exponential variables with these rates is a draw with these odds, and stays on the device.
        picked.append((-row.log() / odds).argmin(keepdim=True))
        distance = (1 - unit @ unit[picked[-1]][0]).clamp(min=torch.finfo(unit.dtype).eps)
        odds = torch.minimum(odds, distance).index_fill(0, picked[-1], 0)  # once picked, never again
    return torch.cat(picked)


def assigned(likeness: Tensor) -> Tensor:
    """The column ``(n,)`` of the greatest value of every row ``(n, clusters)``. A column that gets none takes a row
    from one that gets several, the least value first."""
    own, cluster = likeness.max(dim=1)
    members = one_hot(cluster, likeness.shape[1]).T
    empty = members.sum(dim=1) == 0
    nearest = (members * (own + 2)).argmax(dim=1)  # a cluster never gives away its nearest member
    least = own.index_fill(0, torch.where(empty, nearest[cluster[0]], nearest), torch.inf)
    spare = least.sort(stable=True).indices[: len(members)]
    needs, taker = empty.long().sort(descending=True, stable=True)
    return cluster.scatter(0, spare, torch.where(needs > 0, taker, cluster[spare]))
