"""ApET (arXiv 2602.19870): the tokens that a few basis tokens approximate badly, and the others merged into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import (
    AtDecoder,
    AtEncoderOutput,
    AtProjector,
    Geometry,
    Keep,
    Layer,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    blocks,
    merge,
    tokens_to_keep,
)


@dataclass(frozen=True)
class ApEt(TokenReducer):
    """Keep the tokens that a few basis tokens approximate badly, then some of these basis tokens, and merge the others.

    keep:    how many rows of a tile enter the language model.
    layer:   how many of its layers have run before it is done again.
    later:   how many rows that leaves, a number, or a ratio of those there; with ratio 1 nothing is done.
    basis_token_num: how many basis tokens there are at most; always fewer than rows are kept.
    replace: ``full``: basis tokens take the places of the kept ones with the least error; ``half``: those become the
             mean of both, as for Qwen2.5-VL.
    pool:    ``all`` tokens of a prompt compete in the language model, or the ``first`` as many as a tile keeps while
             the others pass, which is what the official code does.
    start:   the place of the first basis token; drawn from ``seed`` and the picture if None.

    Basis tokens are each the farthest from those before; errors are Euclidean, of ridge regression with 1e-5. Every
    other token goes to the kept one of largest cosine, which becomes the mean; basis rows take none in. Before the
    language model the first basis token takes the first place, inside it that of the largest error.

    All is in float32, where the official code merges in half precision. It stops if no more rows are kept than there
    are basis tokens; if nearly all are kept it may keep a basis token twice, which this one never does, and all tokens
    stay as they are if all are kept. Its variant for video has other rules, and is not part of this. Presets: apet_192,
    apet_128 and apet_64, the published layer averages; apet_qwen, where survivors keep their positions.
    """

    paper = "2602.19870"
    parity = "official vectors, 13 cases"
    merges = True

    keep: Keep = 192 / 576
    layer: Layer = 0.5
    later: Keep = 1 / 3
    basis_token_num: int = 10
    replace: Literal["full", "half"] = "full"
    pool: Literal["all", "first"] = "all"
    start: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis_token_num < 1 or (self.start is not None and self.start < 0):
            raise ValueError(
                f"basis_token_num={self.basis_token_num}, start={self.start}: give at least one basis token, and a "
                "place from 0 on"
            )

    def steps(self, geometry: Geometry) -> list[Step]:
        site = AtProjector if geometry.patches_per_token > 1 else AtEncoderOutput
        again = [] if isinstance(self.later, float) and self.later == 1 else [AtDecoder(layer=self.layer, stage=1)]
        return [site(keep=self.keep), *again]

    def count(self, step: Step, span: Span) -> int:
        if not step.stage:
            return span.keep(self.keep)
        pool = self.pooled(span)
        return span.current - pool + tokens_to_keep(self.later, pool)

    def pooled(self, span: Span) -> int:
        """How many of the tokens in the language model compete: the first ones."""
        return span.current if self.pool == "all" else min(span.current, tokens_to_keep(self.keep, len(span.grids[0])))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        pool = self.pooled(tokens.span) if step.stage else len(tokens)
        kept = tokens.keep - (len(tokens) - pool)
        if kept == pool:
            return tokens.everything()
        rows = tokens.features[:pool].float()
        size = min(self.basis_token_num, kept - 1)
        basis = farthest(rows, self.first(tokens, pool), size)
        ranked = errors(rows, basis).index_fill(0, basis, -1).sort(descending=True, stable=True).indices
        anchors, slots, others = ranked.split([kept - size, size, pool - kept])
        slots = slots if step.stage else slots.sort().values

        unit = normalize(rows, dim=-1)
        nearest = torch.cat([(unit[each] @ unit[anchors].T).argmax(dim=1) for each in blocks(others, len(anchors))])
        group = torch.cat([torch.arange(len(anchors), device=rows.device), nearest])
        merged = merge(rows[torch.cat([anchors, others])], group, len(anchors))
        own = rows[basis] if self.replace == "full" else (rows[basis] + rows[slots]) / 2

        index, order = torch.cat([anchors, slots]).sort()
        row = order.argsort()
        source = torch.full_like(tokens.index, -1)
        source[others] = row[nearest]
        source[anchors] = row[: len(anchors)]
        if self.replace == "half":
            source[slots] = row[len(anchors) :]
        source[basis] = row[len(anchors) :]
        source[pool:] = kept + torch.arange(len(tokens) - pool, device=source.device)
        features = torch.cat([torch.cat([merged, own])[order].to(tokens.features.dtype), tokens.features[pool:]])
        return Selection(torch.cat([index, torch.arange(pool, len(tokens), device=index.device)]), features, source)

    def first(self, tokens: VisualTokens, pool: int) -> Tensor:
        """The place of the first basis token: ``(1,)``."""
        if self.start is None:
            drawn = torch.randint(pool, (1,), generator=tokens.generator(self.seed))
        elif self.start < pool:
            drawn = torch.tensor([self.start])
        else:
            raise ValueError(f"start={self.start}: there are {pool} tokens, the first of which is 0")
        return drawn.to(tokens.features.device)


def farthest(rows: Tensor, first: Tensor, count: int) -> Tensor:
    """The places ``(count,)`` of ``rows`` (n, dim) that are picked from ``first`` ``(1,)`` on, each the farthest from
    the nearest one before it."""
    picked, distance = [first], torch.full_like(rows[:, 0], torch.inf)
    while len(picked) < count:
        last = picked[-1]
        distance = torch.minimum(distance, (rows - rows[last]).square().sum(dim=-1)).index_fill(0, last, -1)
        picked.append(distance.argmax(keepdim=True))
    return torch.cat(picked)[:count]


def errors(rows: Tensor, basis: Tensor) -> Tensor:
    """How far each of ``rows`` (n, dim) is from what ridge regression makes of those at ``basis``: ``(n,)``."""
    chosen = rows[basis]
    ridge = chosen @ chosen.T + 1e-5 * torch.eye(len(basis), device=rows.device)
    weights = torch.linalg.solve(ridge, chosen @ rows.T)
    return (rows - weights.T @ chosen).norm(dim=-1)
