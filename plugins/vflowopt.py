"""VFlowOpt (arXiv 2508.05211): what global tokens attend to, dropped in stages whose settings a search finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
    Count,
    Geometry,
    Keep,
    Layer,
    NextLogits,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    merge,
)
from tokenreduce.signals import Attention, EncoderAttention


@dataclass(frozen=True)
class VFlowOpt(TokenReducer):
    """Keep what the tokens attend to that most others attend to, and merge the rest into one token a cell of the grid.

    Before the language model the least important tokens of an image are merged, each cell of the grid into its most
    important one; at two of its layers the least important of what is left are dropped. Videos, and the images of a
    prompt that has several, are not merged but dropped.

    keeps:  the share that stays at each of the three stages, of what enters it.
    layers: those of the language model at whose input the two later stages act; published are 9 and 18 of 28.
    t:      from how many times the mean of received attention on a token is a global one; without any the one that
            receives most is.
    m:      the side of a cell, in tokens.
    layer:  the encoder layer whose attention is looked at, the last in LLaVA-OneVision.

    How many cells there are to be merged the picture decides. Differing from the official code: newlines do not count
    among the tokens of which a share stays before the language model; several images are ranked together; on a picture
    that was shrunk a token's importance is that of the patch nearest to its centre; the weight of patch entropy,
    ``alpha_v``, is 0 in all released settings and left out. Presets: vflowopt_50, vflowopt_25 and vflowopt_10, the
    released settings of LLaVA-OneVision-7B. Other models want a search: ``tokenreduce.calibrate(model, "vflowopt",
    samples, budget=0.25)``.
    """

    paper = "2508.05211"
    parity = "worked examples"
    merges = True
    compares = "state"

    positions: Positions = field(default="original", kw_only=True)
    keeps: tuple[float, ...] = (0.26510, 0.98334, 0.87733)
    layers: tuple[Layer, ...] = (9 / 28, 18 / 28)
    t: float = 34.7596
    m: float = 15.5808
    layer: Layer = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.keeps) != 3 or len(self.layers) != 2:
            raise ValueError(f"keeps={self.keeps}, layers={self.layers}: give three shares and two layers")

    def steps(self, geometry: Geometry) -> list[Step]:
        later = [AtDecoder(layer=layer, stage=stage) for stage, layer in enumerate(self.layers, 1)]
        return [AtProjector(sees=(EncoderAttention(self.layer),), scope="sample"), *later]

    def count(self, step: Step, span: Span) -> Count:
        total, keep = span.current, self.keeps[step.stage]
        if step.stage:
            return max(1, total - round(total * (1 - keep)))
        if not recycles(span):
            return max(1, round(total * keep))
        merged = self._merged(total)
        cells = sum((int((height - 1) / self.m) + 1) * (int((width - 1) / self.m) + 1) for height, width in maps(span))
        return total - merged + min(1, merged), total - merged + min(merged, cells)

    def with_keep(self, keep: Keep) -> VFlowOpt:
        """``keep`` is the share that stays before the language model."""
        if isinstance(keep, int):
            raise TypeError("VFlowOpt keeps shares of the visual tokens: give a ratio")
        return replace(self, keeps=(keep, *self.keeps[1:]))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if step.stage:
            importance: Any = tokens.values  # of special tokens 0, and the official code's is 1
            return Selection(tokens.best(importance.masked_fill(tokens.tile < 0, 1.0)))
        importance = torch.cat([self.importance(view) for view in tokens.each(EncoderAttention(self.layer))])
        if not recycles(tokens.span):
            kept = tokens.best(importance)
            return Selection(kept, values=importance[kept])
        kept = tokens.best(importance, len(tokens) - self._merged(len(tokens)))
        pool = tokens.others(kept)
        crop = torch.tensor([tile.role == "crop" for tile in tokens.span.tiles], device=pool.device)[tokens.tile[pool]]
        cell = (tokens.coordinates[pool].double() / self.m).floor().long()
        cells, group = torch.cat([crop[:, None], cell], dim=1).unique(dim=0, return_inverse=True)
        slots = pool[foremost(importance[pool], group, len(cells))]

        weight = importance[pool, None].clamp(min=torch.finfo(torch.float32).tiny)
        rows = merge(weight * tokens.features[pool].float(), group, len(cells), how="sum")
        rows = rows / merge(weight, group, len(cells), how="sum")
        index, order = torch.cat([kept, slots]).sort()
        place = order.argsort()
        source = torch.empty_like(tokens.index)
        source[kept], source[pool] = place[: len(kept)], place[len(kept) :][group]
        features = torch.cat([tokens.features[kept], rows.to(tokens.features.dtype)])[order]
        return Selection(index, features, source, values=importance[index])

    def importance(self, view: Attention) -> Tensor:
        """What the global tokens of a tile attend to: ``(tokens,)``."""
        received, _ = view.marginals()
        chosen = received > self.t * received.mean()
        chosen = chosen if bool(chosen.any()) else received == received.max()
        places = torch.arange(view.queries.shape[1], device=received.device)[view.visual]
        return view.received(places[chosen])

    def _merged(self, total: int) -> int:
        """How many of an image's tokens are merged into those of their cells."""
        return min(total, round(total * (1 - self.keeps[0])) + int(total / self.m**2))

    def calibrated(  # type: ignore[override]  # the settings of this search, by name
        self,
        next_logits: NextLogits,
        samples: Sequence[Any],
        geometry: Geometry,
        *,
        budget: float,
        calls: int = 327,
        seed: int = 42,
    ) -> VFlowOpt:
        """The settings whose last states are likest the unreduced model's, summed over ``samples`` by cosine.

        ``budget`` is the share of the visual tokens that a layer of the language model sees on average, ``calls`` how
        many settings are tried: spread evenly over the first two of ``keeps``, the third follows from the budget, over
        ``t`` from 0 to 50 and ``m`` from 3 to 24. The official search is Bayesian, with as many. Raises ``ValueError``
        where there is nothing to try.
        """
        if not samples or not 0 < budget < 1 or calls < 1:
            raise ValueError(f"nothing to search: {len(samples)} samples, calls={calls}, budget={budget} of 0..1")
        full = [next_logits(sample, None).float() for sample in samples]
        points, depth = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed), geometry.decoder_layers
        first, second = (geometry.decoder_layer(layer) for layer in self.layers)
        # With more before the language model too much is seen, whatever follows.
        most = min(1.0, budget * depth / first)
        best, found, tried = -math.inf, self, 0
        while tried < calls:
            before, early, t, m = points.draw(1)[0].tolist()
            before, early = budget + (most - budget) * before, max(early, 1e-3)
            late = (budget / before * depth - first - (second - first) * early) / ((depth - second) * early)
            if not 0 < late <= 1:
                continue
            tried += 1
            candidate = replace(self, keeps=(before, early, late), t=50 * t, m=3 + 21 * m)
            states = [next_logits(sample, candidate).float() for sample in samples]
            alike = [cosine_similarity(one, other, dim=0).nan_to_num() for one, other in zip(states, full, strict=True)]
            if (score := float(torch.stack(alike).sum())) > best:
                best, found = score, candidate
        return found


def recycles(span: Span) -> bool:
    """True for a single image, whose tokens are merged."""
    return len({tile.picture for tile in span.tiles}) == 1 and all(tile.role != "frame" for tile in span.tiles)


def maps(span: Span) -> list[tuple[int, int]]:
    """Height and width, in tokens, of the overview, or whole image, and of the map that crops form together."""
    whole = [(tile.grid.height, tile.grid.width) for tile in span.tiles if tile.role != "crop"]
    crops = [tile for tile in span.tiles if tile.role == "crop"]
    ends = [(tile.row + tile.grid.height, tile.column + tile.grid.width) for tile in crops]
    return [*whole, *([(max(row for row, _ in ends), max(column for _, column in ends))] if ends else [])]


def foremost(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """The place of the highest of the ``scores`` (n,) in every group, the first of equals: ``(groups,)``."""
    order = scores.sort(descending=True, stable=True).indices
    order = order[group[order].argsort(stable=True)]
    return order[torch.searchsorted(group[order], torch.arange(groups, device=group.device))]
