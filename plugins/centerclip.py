"""CenterCLIP (arXiv 2205.00823): the medoids of clusters in every segment of a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Selection, Step, TokenReducer, VisualTokens, blocks, merge


@dataclass(frozen=True)
class CenterClip(TokenReducer):
    """Keep the middle tokens of clusters, which reach over all frames of a segment.

    keep:        of a whole video; every segment has its part by the number of its tokens.
    segments:    how many stretches of equal length a video is cut into; the last is shorter where frames do not divide.
                 A picture that is no video is one.
    metric:      the distance: ``euclidean``, or ``cosine``, which is 1 - the cosine.
    aggregation: ``medoid`` for the tokens themselves, ``mean`` for the means of their clusters.
    threshold, iterations: medoids are moved until they move less than that, all together, and at most so often.

    This is k-medoids++ with its deterministic start. The authors cluster amid the tower of a fine-tuned CLIP, and
    average its class tokens; here tokens are clustered behind the projector. Their other variant, spectral clustering,
    is left out. Presets: centerclip_6, centerclip_4 and centerclip_3, 49 tokens for
    each of so many segments.
    """

    paper = "2205.00823"
    parity = "worked example and a plain loop; no official vectors"
    merges = True

    keep: Keep = 0.25
    segments: int = 3
    metric: Literal["euclidean", "cosine"] = "euclidean"
    aggregation: Literal["medoid", "mean"] = "medoid"
    threshold: float = 1e-5
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments < 1 or self.iterations < 1:
            raise ValueError(f"segments={self.segments}, iterations={self.iterations}: both must be at least 1")

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, scope="picture")]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        frames = len(tokens.span.tiles)
        film = all(tile.role == "frame" for tile in tokens.span.tiles)
        length = -(-frames // self.segments) if film else frames
        segment = tokens.tile // length
        sizes = torch.stack([(segment == number).sum() for number in range(-(-frames // length))]).tolist()
        index, rows, source, seen, start = [], [], torch.full_like(tokens.index, -1), 0, 0
        for places, size in zip(segment.argsort(stable=True).split(sizes), sizes, strict=True):
            seen += size
            count = tokens.keep * seen // len(tokens) - start
            if count:
                points = tokens.features[places].float()
                medoids, cluster = self.clustered(points, count)
                index.append(places[medoids])
                rows.append(merge(points, cluster, count))
                source[places] = start + cluster
            start += count
        if self.aggregation == "medoid":
            return Selection(torch.cat(index))
        return Selection(torch.cat(index), torch.cat(rows).to(tokens.features.dtype), source)

    def clustered(self, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The places of ``count`` medoids of the ``points`` (n, dim), ascending, and the cluster ``(n,)`` of each."""
        if self.metric == "cosine":
            unit = normalize(points, dim=-1)
            distances = (unit @ unit.T).neg_().add_(1)
        else:
            distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        parts = blocks(torch.arange(len(points), device=points.device), len(points))
        medoids, settled = spread(points, distances, count), torch.zeros((), dtype=torch.bool, device=points.device)
        for number in range(self.iterations):
            cluster = nearest(distances, medoids)
            within = [distances[some].masked_fill_(cluster[some, None] != cluster, 0).sum(dim=1) for some in parts]
            moved = least(torch.cat(within), cluster, count)
            # Once they stand still they stay, without asking the device for it every time.
            settled_now = (points[moved] - points[medoids]).norm(dim=-1).sum() < self.threshold
            medoids = torch.where(settled, medoids, moved)
            settled |= settled_now
            if number == 15 and bool(settled):
                break
        medoids = medoids.sort().values
        return medoids, nearest(distances, medoids)


def spread(points: Tensor, distances: Tensor, count: int) -> Tensor:
    """The places ``(count,)`` of the longest of the ``points`` and then of what is farthest from those before."""
    picked = [points.norm(dim=-1).argmax(keepdim=True)]
    nearest_one = distances[picked[0]][0]
    for _ in range(count - 1):
        picked.append(nearest_one.index_fill(0, torch.cat(picked), -1).argmax(keepdim=True))
        nearest_one = torch.minimum(nearest_one, distances[picked[-1]][0])
    return torch.cat(picked)


def nearest(distances: Tensor, medoids: Tensor) -> Tensor:
    """Which of the ``medoids`` (k,) every point is nearest to, each to itself: ``(n,)``."""
    cluster = distances[medoids].argmin(dim=0)
    return cluster.index_copy(0, medoids, torch.arange(len(medoids), device=medoids.device))


def least(costs: Tensor, cluster: Tensor, count: int) -> Tensor:
    """The place of the least of the ``costs`` (n,) in every ``cluster`` (n,), the first of equals: ``(count,)``."""
    order = costs.sort(stable=True).indices
    order = order[cluster[order].argsort(stable=True)]
    return order[torch.searchsorted(cluster[order], torch.arange(count, device=order.device))]
