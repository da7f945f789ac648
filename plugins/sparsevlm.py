"""SparseVLM (arXiv 2410.04417): the telling words of the prompt say which visual tokens stay; the rest is recycled.

The reference is the official code's version 1.5. Its lists are presets; the default is that for 192 tokens, as ratios.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pdist

from tokenreduce.reducer import (
    AtDecoder,
    Geometry,
    Keep,
    Layer,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    merge,
)
from tokenreduce.signals import DecoderAttention, ProjectedFeatures, TextEmbeddings


@dataclass(frozen=True)
class SparseVlm(TokenReducer):
    """Inside the language model, keep what telling words attend to, and merge the best of the rest into a few tokens.

    layers: after which layers tokens are pruned, by those layers' own attention.
    keeps:  what each pruning keeps, of the tokens that entered; at most all but one. Merged tokens come on top, stand
            behind the kept ones, and compete at the next pruning.

    A tie between tokens goes to the one that comes first. Centres of clusters tie whenever the two densest tokens are
    each other's nearest; they come in the order of ``torch.topk`` on a CPU, whatever the device, as in the official
    code without its random noise of 1e-6.
    """

    paper = "2410.04417"
    merges = True
    parity = "official vectors, 8 cases; 2 end to end"

    layers: tuple[Layer, ...] = (2 / 32, 6 / 32, 15 / 32)
    keeps: tuple[Keep, ...] = (300 / 576, 200 / 576, 110 / 576)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != len(self.keeps) or len({type(keep) for keep in self.keeps}) > 1:
            raise ValueError(f"layers={self.layers}, keeps={self.keeps}: give every layer one ratio, or one number")

    def steps(self, geometry: Geometry) -> list[Step]:
        return [
            AtDecoder(layer=ran + 1, stage=stage, sees=(DecoderAttention(ran), ProjectedFeatures(), TextEmbeddings()))
            for stage, ran in enumerate(map(geometry.decoder_layer, self.layers))
        ]

    def count(self, step: Step, span: Span) -> int:
        kept, _, clusters = self.shares(step, span)
        return kept + clusters

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention, words = tokens[step.sees[0]], tokens.carried
        if words is None:
            words = telling(tokens[ProjectedFeatures()], tokens[TextEmbeddings()])
        scores = attention.received(attention.text[words])
        keep, recycle, clusters = self.shares(step, tokens.span)
        kept = tokens.best(scores, keep)
        pruned = tokens.others(kept)
        recycled = pruned[tokens.best(scores[pruned], recycle)]
        centres, cluster, merged = cluster_and_merge(tokens.features[recycled], clusters)
        source = torch.full_like(tokens.index, -1)
        source[kept] = torch.arange(len(kept), device=kept.device)
        source[recycled] = len(kept) + cluster
        features = torch.cat([tokens.features[kept], merged])
        return Selection(torch.cat([kept, recycled[centres]]), features, source, carry=words)

    def shares(self, step: Step, span: Span) -> tuple[int, int, int]:
        """How many tokens stay as they are, how many of the others are recycled, and into how many."""
        kept = min(span.keep(self.keeps[step.stage]), span.current - 1)
        recycled = int(0.3 * (span.current - kept)) + 1
        return kept, recycled, recycled // 10 + 1

    def with_keep(self, keep: Keep) -> SparseVlm:
        """``keep`` is what the first pruning keeps; the others follow in the proportions that they have."""
        scaled = [keep * each / self.keeps[0] for each in self.keeps]
        if isinstance(keep, int):
            return replace(self, keeps=tuple(max(1, round(each)) for each in scaled))
        return replace(self, keeps=tuple(min(1.0, round(each, 6)) for each in scaled))


def telling(visual: Tensor, text: Tensor) -> Tensor:
    """The places of the words that visual tokens are more like than the average word; of all words if none is."""
    relevance = (visual.float() @ text.float().T).softmax(dim=-1).mean(dim=0)
    above = relevance > relevance.mean()
    return (above if bool(above.any()) else ~above).nonzero()[:, 0]


def cluster_and_merge(features: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Density peaks among nearest neighbours: centres ``(clusters,)``, each token's cluster, the clusters' means."""
    points = features.float()
    # Not by way of a matrix product, whose rounding would decide between two tokens that are each other's nearest.
    upper = torch.ones(len(points), len(points), dtype=torch.bool, device=points.device).triu(diagonal=1)
    half = torch.zeros_like(upper, dtype=points.dtype).masked_scatter_(upper, pdist(points) / points.shape[-1] ** 0.5)
    distances = half + half.T
    density = (-distances.topk(clusters, largest=False).values.square().mean(dim=-1)).exp()
    separation = distances.where(density > density[:, None], distances.max()).amin(dim=-1)
    centres = (density * separation).cpu().topk(clusters).indices.to(points.device)
    cluster = distances[centres].argmin(dim=0)
    cluster[centres] = torch.arange(clusters, device=cluster.device)
    sizes = merge(torch.ones_like(points[:, :1]), cluster, clusters, "sum")
    merged = merge(points, cluster, clusters, "sum") / (sizes + 1e-6)
    return centres, cluster, merged.to(features.dtype)
