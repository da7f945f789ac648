"""PruneSID (arXiv 2603.09480): groups of tokens by principal component, and from each the attended and dissimilar."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import (
    AtEncoderOutput,
    AtProjector,
    Geometry,
    Keep,
    Layer,
    Selection,
    Step,
    TokenReducer,
    VisualTokens,
    blocks,
)
from tokenreduce.signals import ClassToken, EncoderAttention


@dataclass(frozen=True)
class PruneSid(TokenReducer):
    """Group tokens by principal component, and keep of every group those most attended to that are not alike.

    ``keep`` counts all rows: the class token, which goes on to the language model first, and then the tokens group by
    group, not in raster order. A quarter of ``keep`` is the number of groups. In a group, a token is suppressed if it
    is more alike to a better one than ``keep`` / 32 times the mean cosine of two tokens. ``layer`` is the encoder layer
    whose class token's attention says what is better.

    An encoder without class token follows the authors' code for Qwen2-VL: after the projector, by each token's weight
    in its component, and another threshold. Tokens then stay in raster order, as there where more than 150 are kept;
    that code also keeps 16 tokens at least, and the survivors' position ids.

    Components come from a random projection, as in the official code, which draws another one at every call; here
    ``seed`` says which. With one token to keep, the class token is it. Presets: prunesid_64, prunesid_128 and
    prunesid_192, the published budgets.
    """

    paper = "2603.09480"
    parity = "official vectors, 4 cases"
    merges = True

    keep: Keep = 1 / 9
    layer: Layer = -2
    seed: int = 0

    def steps(self, geometry: Geometry) -> list[Step]:
        if not geometry.class_token:
            return [AtProjector(keep=self.keep, rounding="even")]
        sees = (EncoderAttention(self.layer), ClassToken())
        return [AtEncoderOutput(keep=self.keep, rounding="even", sees=sees)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        features, kept, passed_on = tokens.features.float(), tokens.keep, len(step.sees) // 2
        weight, group = loadings(features.sigmoid(), max(1, kept // 4), self.seed).max(dim=1)
        scores = tokens[EncoderAttention(self.layer)].received() if passed_on else weight
        unit = normalize(features, dim=-1)

        ranked = scores.sort(descending=True, stable=True).indices
        ranked = ranked[group[ranked].sort(stable=True).indices]
        sizes = group.bincount(minlength=max(1, kept // 4)).tolist()
        groups = ranked.split(sizes)
        threshold = limit(unit, kept, bool(passed_on))
        alive = [survivors(unit[members], scores[members] > 0, threshold) for members in groups]
        counts = torch.stack([each.sum() for each in alive]).tolist()
        chosen = [
            members[(~left).sort(stable=True).indices][:quota]
            for members, left, quota in zip(groups, alive, quotas(sizes, counts, kept, passed_on), strict=True)
        ]
        index = torch.cat(chosen)[: kept - passed_on]
        if not passed_on:
            return Selection(index.sort().values)
        source = torch.full_like(tokens.index, -1)
        source[index] = torch.arange(1, kept, device=index.device)
        rows = torch.cat([tokens[ClassToken()][None], tokens.features[index]])
        return Selection(torch.cat([index.new_full((1,), -1), index]), rows, source)


def loadings(rows: Tensor, components: int, seed: int) -> Tensor:
    """How much each of ``rows`` (tokens, channels) has of the first principal components, ``(tokens, components)``,
    without sign. As ``torch.pca_lowrank`` of the transposed matrix, after ``torch.manual_seed(seed)``."""
    centred = (rows - rows.mean(dim=1, keepdim=True)).T  # every token's mean over channels
    tall = centred if centred.shape[0] >= centred.shape[1] else centred.T
    components = min(components, *tall.shape)
    start = torch.randn(tall.shape[1], components, generator=torch.Generator().manual_seed(seed)).to(tall)
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    left, _, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    return (right.T if tall is centred else basis @ left).abs()


def limit(unit: Tensor, kept: int, class_token: bool) -> Tensor:
    """The cosine above which two tokens are alike, from directions ``(n, dim)``. The mean of all cosines comes from the
    directions' sum."""
    count, exact = len(unit), unit.double()
    own = exact.square().sum()
    pairs = (exact.sum(dim=0).square().sum() - own) / 2
    if class_token:
        return kept / 32 * pairs / max(1, count * (count - 1) // 2)
    return max(18 * kept / count, 1) * (pairs + own) / count**2


def survivors(unit: Tensor, alive: Tensor, threshold: Tensor) -> Tensor:
    """Which tokens are left ``(n,)`` bool of those ``alive``, best first, if each suppresses all that are alike to
    it."""
    alive, place = alive.clone(), 0
    for block in blocks(torch.arange(len(unit), device=unit.device), len(unit)):
        for alike in unit[block] @ unit.T > threshold:
            place += 1
            alive[place:] &= ~(alike[place:] & alive[place - 1])
    return alive


def quotas(sizes: list[int], survivors: list[int], kept: int, passed_on: int) -> list[int]:
    """How many tokens each group gives, from how many it has and how many of these survived."""
    least = [min(1, size) for size in sizes]
    most = [min(5 * math.ceil(kept / 64), *each) for each in zip(sizes, survivors, strict=True)]
    while sum(most) < kept:
        most = [min(bound + 1, size) for bound, size in zip(most, sizes, strict=True)]
    total = max(sum(least), kept - passed_on)
    shares = torch.tensor(survivors) / max(1, sum(survivors))
    ends = (shares.cumsum(0) * (total - sum(least))).round().int().tolist()
    shared = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    given = [min(sum(each), bound) for *each, bound in zip(least, shared, most, strict=True)]
    for group in sorted(range(len(sizes)), key=lambda each: -survivors[each]):
        given[group] += min(most[group] - given[group], total - sum(given))
    return given
