"""The baselines that keep a comparison honest: what no method at all, no picture, or no cleverness achieves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.reducer import (
    AtInput,
    AtProjector,
    Geometry,
    Keep,
    ScoreReducer,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    merge,
)


@dataclass(frozen=True)
class NoReduction(TokenReducer):
    """Keep every visual token: the unreduced model."""

    paper = "baseline: the model as it is"

    def steps(self, geometry: Geometry) -> list[Step]:
        return []


@dataclass(frozen=True)
class NoImage(TokenReducer):
    """Take the picture away: what the text alone gives."""

    paper = "baseline: the question without its picture"

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtInput()]

    def count(self, step: Step, span: Span) -> int:
        return 0


@dataclass(frozen=True)
class Downsample(TokenReducer):
    """Make the picture smaller before the vision tower, so that it gives fewer tokens.

    The tokens kept form a grid of the picture's shape, so there may be a few less than ``keep`` allows.
    """

    paper = "baseline: a smaller picture"

    keep: Keep = 0.25

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtInput(keep=self.keep)]

    def count(self, step: Step, span: Span) -> int:
        return len(span.grid.fit(span.keep(self.keep)))


@dataclass(frozen=True)
class Random(ScoreReducer):
    """Keep tokens drawn at random, evenly over the picture; a larger ``keep`` adds to the tokens of a smaller one."""

    paper = "baseline: seeded chance"

    keep: Keep = 0.25
    seed: int = 0

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep)]

    def score(self, tokens: VisualTokens) -> Tensor:
        drawn = torch.rand(len(tokens), generator=tokens.generator(self.seed))
        return drawn.to(tokens.features.device)


@dataclass(frozen=True)
class Uniform(TokenReducer):
    """Keep every n-th token in raster order: the middles of ``keep`` equal stretches."""

    paper = "baseline: a centred stride"

    keep: Keep = 0.25

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        stretches = torch.arange(tokens.keep, device=tokens.features.device)
        return Selection((2 * stretches + 1) * len(tokens) // (2 * tokens.keep))


@dataclass(frozen=True)
class Pool(TokenReducer):
    """Average the tokens of every cell of a coarser grid.

    The cells form a grid of the picture's shape, so there may be a few less than ``keep`` allows.
    """

    paper = "baseline: average pooling"
    merges = True

    keep: Keep = 0.25

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep)]

    def count(self, step: Step, span: Span) -> int:
        return len(span.grid.fit(span.keep(self.keep)))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        grid = tokens.span.grid
        if len(tokens) != len(grid):
            raise ValueError(
                f"pool averages whole grids, but only {len(tokens)} of {len(grid)} tokens are left: run it first"
            )
        coarse = grid.fit(tokens.span.keep(self.keep))
        centres, cells = (places.to(tokens.features.device) for places in grid.cells(coarse))
        means = merge(tokens.features.float(), cells, len(centres))
        return Selection(centres, means.to(tokens.features.dtype), source=cells)
