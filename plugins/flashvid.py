"""FlashVID (arXiv 2602.08024): telling tokens of every frame, and trees of all others through time, clustered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
    check_keep,
    density_peaks,
    merge,
)
from tokenreduce.signals import DecoderAttention, EncoderAttention

Method = Literal["attn", "div", "attn_div", "attn_div_v2"]


@dataclass(frozen=True)
class FlashVid(TokenReducer):
    """Keep tokens of every frame that are attended to and unlike, merge the others along trees through time and
    cluster these.

    keep:      retention_ratio, of every frame on average over the layers of the language model.
    expansion: how much more of every frame enters it. Counts are rounded up.
    alpha:     the share of that which goes to tokens that stay as they are.
    token_selection_method: which these are: those that are attended to (``attn``), those that are far from one another
               (``div``), or both (``attn_div``; ``attn_div_v2`` with their likeness to the frames of the segment).
    temporal_threshold: the least cosine to a token of the frame before of one that is merged into that.
    segment_threshold: the least cosine between the means of two frames of one segment; trees stay within one.
    min_segment_num: how many segments there are at least, by cuts where frames are least alike, unless
               ``complementary_segment`` is False.
    do_segment: False for a video that is one segment.
    pruning_layer: the language model's layer at whose input only what the prompt's last token attends to is left.
    llm_retention_ratio: the share that is left there, rounded up.

    A tree is its tokens' sum over one more than its root has direct children, as in the official code: a deep one is
    longer than the mean. A frame alone is clustered whole, so a token may be in two of its rows; so is an image, or
    each part of one, which the official code leaves alone. The noise of 1e-6 on densities is left out, a token is never
    picked twice, and a frame that is asked for all it has, or more, stays as it is. Presets: flashvid_r10,
    flashvid_r15, flashvid_r20 and flashvid_r25; flashvid_qwen and flashvid_qwen3 for those models.
    """

    paper = "2602.08024"
    parity = "official vectors, 5 cases"
    merges = True

    keep: Keep = 0.25
    expansion: float = 1.25
    alpha: float = 0.7
    token_selection_method: Method = "attn_div_v2"
    temporal_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segment_num: int = 8
    complementary_segment: bool = True
    do_segment: bool = True
    pruning_layer: Layer = 20 / 28
    llm_retention_ratio: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(float(self.llm_retention_ratio))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is not a share of a frame's tokens: it must be from 0 to 1")

    def steps(self, geometry: Geometry) -> list[Step]:
        ranking = DecoderAttention(geometry.decoder_layer(self.pruning_layer) - 1)
        return [
            AtProjector(scope="picture", ordered=True, sees=(EncoderAttention(geometry.feature_layer),)),
            AtDecoder(layer=self.pruning_layer, stage=1, sees=(ranking,)),
        ]

    def positions_after(self, step: Step) -> Positions:
        return "original" if step.stage else self.positions

    def count(self, step: Step, span: Span) -> Count:
        if step.stage:
            return min(span.current, math.ceil(span.entered * self.llm_retention_ratio))
        sizes = [len(grid) for grid in span.grids] if len(span.tiles) > 1 else [span.current]
        if sum(sizes) != span.current:
            return 0, span.current
        shares = [self.shares(span, size) for size in sizes]
        if len(sizes) > 1 and span.film:
            least = sum(map(sum, shares))
            return least, least + sum(rest > 0 for _, rest in shares)
        return sum(picks + math.ceil(size * (rest / size)) for size, (picks, rest) in zip(sizes, shares, strict=True))

    def shares(self, span: Span, size: int) -> tuple[int, int]:
        """How many of a frame's ``size`` tokens stay as they are, and how many rows the others become."""
        ratio = self.keep if isinstance(self.keep, float) else Fraction(self.keep, span.entered)
        budget = math.ceil(size * (ratio * Fraction(span.entered, span.current)) * self.expansion)
        if budget >= size:
            return size, 0
        picks = math.ceil(budget * self.alpha)
        return picks, budget - picks

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if step.stage:
            return Selection(tokens.best(tokens[step.sees[0]].received(-1)))
        received = torch.cat([attention.received(slice(None)) for attention in tokens.each(step.sees[0])])
        tiles = len(tokens.span.tiles)
        if tokens.span.film:
            size = len(tokens) // tiles
            frames = (tokens.tile * size + tokens.place).argsort().view(tiles, size)
            means = normalize(tokens.features[frames].float().mean(dim=1), dim=-1)
            lengths = self.segments((means[:-1] * means[1:]).sum(dim=-1).tolist()) if self.do_segment else [tiles]
            segments = list(frames.split(lengths))
        else:
            segments = [(tokens.tile == number).nonzero().T for number in range(tiles)]
        index, rows, source, start = [], [], torch.full_like(tokens.index, -1), 0
        for places in segments:
            picks, rest = self.shares(tokens.span, places.shape[1])
            features, scores = tokens.features[places].float(), received[places]
            own, merged, into = self.compressed(features, scores, picks, rest)
            index.append(places.flatten()[own])
            rows.append(merged)
            source[places.flatten()] = torch.where(into < 0, -1, into + start)
            start += len(own)
        # The order of tokens, and of two rows for one the picked one first, which alone stands for it.
        together = torch.cat(index)
        key = tokens.tile[together] * (len(tokens) + 1) + tokens.place[together]
        order = key.argsort(stable=True)
        key, together = key[order], together[order]
        again = torch.cat([torch.zeros_like(key[:1]), key[1:] == key[:-1]]).bool()
        source = torch.where(source < 0, -1, order.argsort()[source])
        return Selection(together.masked_fill(again, -1), torch.cat(rows)[order].to(tokens.features.dtype), source)

    def segments(self, likeness: list[float]) -> list[int]:
        """How many frames every segment has, by the ``likeness`` of each frame to the next."""
        cuts = [place for place, alike in enumerate(likeness) if alike < self.segment_threshold]
        missing = max(0, self.min_segment_num - len(cuts) - 1) if self.complementary_segment else 0
        whole = [place for place in range(len(likeness)) if place not in cuts]
        ends = sorted([-1, *cuts, *sorted(whole, key=lambda place: likeness[place])[:missing], len(likeness)])
        return [end - begin for begin, end in pairwise(ends)]

    def compressed(self, features: Tensor, scores: Tensor, picks: int, rest: int) -> tuple[Tensor, Tensor, Tensor]:
        """What ``features`` (frames, n, dim) of a segment become: the places that rows stand for ``(rows,)``, among all
        of the segment's tokens, the rows ``(rows, dim)``, and of every token the row that it went into, -1 for none."""
        frames, size = features.shape[:2]
        event = features.mean(dim=(0, 1))
        picked = torch.stack([self.picked(*frame, event, picks) for frame in zip(features, scores, strict=True)])
        starts = size * torch.arange(frames, device=picked.device)[:, None]
        index, rows = [(picked + starts).flatten()], [features.flatten(0, 1)[(picked + starts).flatten()]]
        row = torch.full((frames, size), -1, device=picked.device)
        if rest:
            taken = torch.zeros_like(row, dtype=torch.bool).scatter(1, picked, True)
            merging, parent = self.trees(features, taken, (picks + rest) * frames)
            values = aggregated(features, merging, parent)
            roots = [mask.nonzero()[:, 0] for mask in (~merging & (~taken if frames > 1 else True)).cpu()]
            share, start = rest * frames / sum(map(len, roots)), picks * frames
            for number, own in enumerate(roots):
                own = own.to(row.device)
                points, clusters = values[number, own], math.ceil(len(own) * share)
                centres = cluster = torch.arange(clusters, device=row.device)
                if clusters and share < 1:
                    centres, cluster = density_peaks(points, clusters)
                    points = merge(points, cluster, clusters)
                index.append(own[centres] + number * size)
                rows.append(points)
                row[number, own] = start + cluster
                if number:
                    row[number] = row[number - 1][parent[number]].where(merging[number], row[number])
                start += clusters
        row.view(-1)[index[0]] = torch.arange(len(index[0]), device=row.device)
        return torch.cat(index), torch.cat(rows), row.flatten()

    def picked(self, features: Tensor, scores: Tensor, event: Tensor, count: int) -> Tensor:
        """The places ``(count,)`` of a frame's tokens that stay as they are, ascending. ``event`` (dim,) is the mean of
        its segment."""
        if count in (0, len(features)) or self.token_selection_method == "attn":
            return best(scores, count)
        unit = normalize(features, dim=-1)
        distances = (unit @ unit.T).neg_().add_(1)
        if self.token_selection_method != "div":
            distances *= scores if self.token_selection_method == "attn_div" else scores * (features @ event)
        nearest = distances.topk(2, dim=0, largest=False).values[1]
        places = [nearest.argmax(keepdim=True)]
        nearest = distances[places[0]][0].index_fill(0, places[0], -torch.inf)
        for _ in range(count - 1):
            places.append(nearest.argmax(keepdim=True))
            nearest = torch.minimum(nearest, distances[places[-1]][0]).index_fill(0, places[-1], -torch.inf)
        return torch.cat(places).sort().values

    def trees(self, features: Tensor, taken: Tensor, least: int) -> tuple[Tensor, Tensor]:
        """Which tokens are merged into one of the frame before, and into which: both ``(frames, n)``.

        ``taken`` (frames, n) are on neither side. So many are not merged that ``least`` are left.
        """
        unit = normalize(features, dim=-1)
        likeness, parent = torch.full(taken.shape, -1.0, device=unit.device), torch.zeros_like(taken, dtype=torch.long)
        for number in range(1, len(unit)):
            pairs = (unit[number] @ unit[number - 1].T).masked_fill_(taken[number - 1], -1)
            likeness[number], parent[number] = pairs.max(dim=1)
        likeness.masked_fill_(taken, -1)
        likely = likeness > self.temporal_threshold
        soft = likeness.flatten().topk(taken.numel() - least).values[-1].clamp(min=-1 + 1e-6)
        return torch.where((~likely).sum() < least, likeness > soft, likely), parent


def aggregated(features: Tensor, merging: Tensor, parent: Tensor) -> Tensor:
    """Every token ``(frames, n, dim)`` with its tree's sum, over one more than it has direct children."""
    values, size = features.clone(), features.shape[1]
    for number in range(len(features) - 1, 0, -1):
        group = parent[number].where(merging[number], size)
        values[number - 1] += merge(values[number], group, size + 1, "sum")[:size]
        children = merge(torch.ones_like(values[number, :, :1]), group, size + 1, "sum")[:size]
        values[number - 1] /= torch.where(merging[number - 1, :, None], 1, 1 + children)
    return values
