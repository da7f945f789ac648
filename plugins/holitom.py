"""HoliTom (arXiv 2505.21334): what stands still in a video is averaged over time, then tokens are merged in space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
    Count,
    Geometry,
    Keep,
    Layer,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    best,
    density_peaks,
    merge,
)
from tokenreduce.signals import DecoderAttention, EncoderAttention


@dataclass(frozen=True)
class HoliTom(TokenReducer):
    """Average what stands still in a stretch of a video, keep what is attended to of the rest, and merge once more
    inside.

    The stretches are those by which most tokens are saved. Of what stands still in one, a share is left as clusters, in
    the stretch's first frame; of what moves, the tokens that receive most attention, frame by frame.

    keep:       of a whole video; RETAIN_RATIO. Counts of what moves are rounded up, so a little more stays.
    tau:        the least cosine between two frames of what stands still; T.
    beta:       the weight of a cluster's centre against the mean of its others; None averages all, NO_BETA=1.
    neighbours: of how many tokens, itself among them, the distances make a token's density, at most as many as
                there are clusters; K.
    window:     the most frames of a stretch; MAX_WINDOW_SIZE.
    layer:      the language model's layer at whose input tokens are merged; HOLITOM_k. None leaves that out.
    inner_keep: what is left there, 1 - HOLITOM_r, rounded half to even: what the prompt's last token attends to. Every
                other token is averaged into the one that it is most like.

    An image, or each part of one that is cut up, is a frame in which all moves, where the official code leaves
    images alone; so are frames of which tokens are gone before. ``D`` above 0, with which the official code stops, is
    left out, and so is its random noise of 1e-6 on densities. Rows have the order for models with one newline a video.
    Presets: holitom_r10, holitom_r15, holitom_r20 and holitom_r25.
    """

    paper = "2505.21334"
    parity = "official vectors, 5 cases; worked example inside the language model"
    merges = True

    keep: Keep = 0.15
    tau: float = 0.8
    beta: float | None = 0.6
    neighbours: int = 7
    window: int = 1024
    layer: Layer | None = 18 / 28
    inner_keep: Keep = 0.5

    def steps(self, geometry: Geometry) -> list[Step]:
        outer = AtProjector(scope="picture", ordered=True, sees=(EncoderAttention(geometry.feature_layer),))
        if self.layer is None:
            return [outer]
        ranking = DecoderAttention(geometry.decoder_layer(self.layer) - 1)
        return [outer, AtDecoder(layer=self.layer, keep=self.inner_keep, rounding="even", stage=1, sees=(ranking,))]

    def positions_after(self, step: Step) -> Positions:
        return "original" if step.stage else self.positions

    def count(self, step: Step, span: Span) -> Count:
        if step.stage:
            return super().count(step, span)
        ratio, sizes = self.ratio(span), [len(grid) for grid in span.grids]
        if len(sizes) == 1:
            return math.ceil(span.current * ratio)
        if not span.film and sum(sizes) == span.current:
            return sum(math.ceil(size * ratio) for size in sizes)
        # Of every frame what moves is rounded up, and of two frames or more together what stands still, by a half.
        return 0, min(span.current, math.floor(span.current * ratio + 1.25 * len(sizes)))

    def ratio(self, span: Span) -> float | Fraction:
        """The share of the tokens that are left to keep."""
        share = self.keep if isinstance(self.keep, float) else Fraction(self.keep, span.entered)
        return min(share * Fraction(span.entered, span.current), 1)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if step.stage:
            return averaged(tokens.features, tokens.best(tokens[step.sees[0]].received(-1)))
        received = torch.cat([attention.received(slice(None)) for attention in tokens.each(step.sees[0])])
        ratio, count = self.ratio(tokens.span), len(tokens.span.tiles)
        if not tokens.span.film:
            tiles = [(tokens.tile == number).nonzero()[:, 0] for number in range(count)]
            return Selection(torch.cat([tile[best(received[tile], math.ceil(len(tile) * ratio))] for tile in tiles]))
        size = len(tokens) // count
        frames = (tokens.tile * size + tokens.place).argsort().view(count, size)
        features = tokens.features[frames].float()
        still = (cosine_similarity(features[:-1], features[1:], dim=-1) > self.tau).cpu()
        segments, saved = static_windows(still, self.window)
        ratio = min(ratio / Fraction(len(tokens) - saved, len(tokens)), 1)

        index, rows, source, start = [], [], torch.full_like(tokens.index, -1), 0
        for first, last in segments:
            static = still[first:last].all(dim=0) & (last > first)
            places, moving = (mask.nonzero()[:, 0].to(frames.device) for mask in (static, ~static))
            means = features[first : last + 1, places].mean(dim=0)
            clusters, attended = round(len(places) * ratio), math.ceil(len(moving) * ratio)
            if clusters:
                centres, cluster = density_peaks(means, clusters, self.neighbours)
                rows.append(self.merged(means, centres, cluster))
                index.append(frames[first, places[centres]])
                source[frames[first : last + 1, places]] = start + cluster
            scores = received[frames[first : last + 1, moving]]
            dynamic = scores.sort(dim=1, descending=True, stable=True).indices[:, :attended].sort(dim=1).values
            kept = frames[first : last + 1, moving].gather(1, dynamic).flatten()
            source[kept] = start + clusters + torch.arange(len(kept), device=kept.device)
            index.append(kept)
            rows.append(tokens.features[kept].float())
            start += clusters + len(kept)
        return Selection(torch.cat(index), torch.cat(rows).to(tokens.features.dtype), source)

    def merged(self, points: Tensor, centres: Tensor, cluster: Tensor) -> Tensor:
        """The row ``(clusters, dim)`` of every cluster of ``points`` (n, dim)."""
        if self.beta is None:
            return merge(points, cluster, len(centres))
        sizes = merge(torch.ones_like(points[:, :1]), cluster, len(centres), "sum")
        others = (merge(points, cluster, len(centres), "sum") - points[centres]) / (sizes - 1).clamp(min=1)
        return points[centres].where(sizes == 1, self.beta * points[centres] + (1 - self.beta) * others)


def static_windows(still: Tensor, window: int) -> tuple[list[tuple[int, int]], int]:
    """The stretches, as their first and last frames, by which most tokens are saved, and how many that are.

    ``still`` (frames - 1, n) bool says which tokens are like those of the next frame. A stretch of f frames saves f - 1
    times as many tokens as stand still throughout it.
    """
    frames = len(still) + 1
    alike = [still[first:].cumprod(dim=0).sum(dim=1).tolist() for first in range(frames - 1)]
    best_until, begins = [0], []  # of so many frames; where the stretch begins that ends there
    for last in range(frames):
        most, begin = best_until[last], last
        for first in range(last - 1, max(-1, last - window), -1):
            saved = best_until[first] + alike[first][last - first - 1] * (last - first)
            if saved > most:
                most, begin = saved, first
        best_until.append(most)
        begins.append(begin)
    segments, last = [], frames - 1
    while last >= 0:
        segments.append((begins[last], last))
        last = begins[last] - 1
    return segments[::-1], best_until[-1]


def averaged(states: Tensor, kept: Tensor) -> Selection:
    """Average every other token into the kept one that it is most like, one after the other, so that a later one
    weighs more."""
    stays = torch.zeros(len(states), dtype=torch.bool, device=states.device).index_fill(0, kept, True)
    dropped = (~stays).nonzero()[:, 0]
    unit = normalize(states.float(), dim=-1)
    nearest = (unit[dropped] @ unit[kept].T).argmax(dim=1)
    order = torch.cat([kept, dropped])
    row = torch.cat([torch.arange(len(kept), device=kept.device), nearest])
    halvings = behind(row, len(kept)) + ~stays[order]
    rows = merge(torch.exp2(-halvings)[:, None] * states[order].float(), row, len(kept), "sum")
    return Selection(kept, rows.to(states.dtype), torch.empty_like(row).index_copy(0, order, row))


def behind(group: Tensor, groups: int) -> Tensor:
    """How many of its own group stand behind each of ``group`` (n,): ``(n,)`` float32."""
    order = group.argsort(stable=True)
    ends = torch.searchsorted(group[order], torch.arange(groups, device=group.device), right=True)
    left = ends[group[order]] - 1 - torch.arange(len(group), device=group.device)
    return torch.empty_like(left).index_copy(0, order, left).float()
