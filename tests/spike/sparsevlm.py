"""SparseVLM, arXiv 2410.04417, version 1.5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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
    best,
    layer_index,
    tokens_to_keep,
)
from tokenreduce.signals import DecoderAttention, ProjectedFeatures, TextEmbeddings


@dataclass(frozen=True)
class SparseVlm(TokenReducer):
    """Keep what the telling words of the prompt attend to, and merge the best of the rest into a few tokens behind."""

    layers: tuple[Layer, ...] = (2 / 32, 6 / 32, 15 / 32)
    keeps: tuple[Keep, ...] = (300, 200, 110)

    def steps(self, geometry: Geometry) -> list[Step]:
        ran = [layer_index(layer, geometry.decoder_layers) for layer in self.layers]
        return [
            AtDecoder(keep, (DecoderAttention(layer), ProjectedFeatures(), TextEmbeddings()), layer + 1)
            for layer, keep in zip(ran, self.keeps, strict=True)
        ]

    def count(self, step: Step, span: Span) -> int:
        kept = self._kept(step, span)
        return kept + clusters_of(recycled_of(span.current - kept))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        text = tokens[TextEmbeddings()]
        raters = telling(tokens[ProjectedFeatures()], text) if tokens.carried is None else tokens.carried
        scores = self.score(step, tokens, raters)
        kept = best(scores, self._kept(step, tokens.span))

        pruned = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
        recycled = pruned[best(scores[pruned], recycled_of(len(pruned)))]
        centres, cluster, merged = cluster_and_merge(tokens.features[recycled], clusters_of(len(recycled)))

        source = torch.full((len(tokens),), -1)
        source[kept] = torch.arange(len(kept))
        source[recycled] = len(kept) + cluster
        features = torch.cat([tokens.features[kept], merged])
        return Selection(torch.cat([kept, recycled[centres]]), features, source, carry=raters)

    @staticmethod
    def score(step: Step, tokens: VisualTokens, raters: Tensor) -> Tensor:
        """Attention to every visual token, averaged over heads and over the raters ``(raters,)``, text places."""
        attention = tokens[step.sees[0]]
        return attention.mean(attention.text[raters]).mean(dim=0)

    @staticmethod
    def _kept(step: Step, span: Span) -> int:
        wanted = step.keep or 1.0
        kept = min(wanted, span.entered) if isinstance(wanted, int) else tokens_to_keep(wanted, span.entered)
        return min(kept, span.current - 1)


def recycled_of(pruned: int) -> int:
    return int(0.3 * pruned) + 1


def clusters_of(recycled: int) -> int:
    return recycled // 10 + 1


def telling(visual: Tensor, text: Tensor) -> Tensor:
    """The places of the words that visual tokens are more like than the average word."""
    relevance = (visual @ text.T).softmax(dim=-1).mean(dim=0)
    return (relevance > relevance.mean()).nonzero()[:, 0]


def cluster_and_merge(features: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Density peaks among nearest neighbours: centres ``(clusters,)``, each token's cluster, the clusters' means."""
    distances = torch.cdist(features, features) / features.shape[-1] ** 0.5
    density = (-distances.topk(clusters, largest=False).values.square().mean(dim=-1)).exp()
    denser = density[None, :] > density[:, None]
    separation = distances.where(denser, distances.max()).amin(dim=-1)
    centres = (density * separation).sort(descending=True, stable=True).indices[:clusters]
    cluster = distances[centres].argmin(dim=0)
    cluster[centres] = torch.arange(clusters)
    members = one_hot(cluster, clusters).T.to(features.dtype)
    return centres, cluster, members @ features / (members.sum(dim=1, keepdim=True) + 1e-6)
