"""QuoTA (arXiv 2503.08689): every frame of a video is made as small as it matters little to the question."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenreduce.reducer import (
    AtProjector,
    Count,
    Geometry,
    Grid,
    Keep,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.signals import QuestionLikeness, Signal


@dataclass(frozen=True)
class Quota(TokenReducer):
    """Share a video's tokens among its frames by the square of their scores, and scale each frame's map to its share.

    keep:   of a whole video; published are 12544 tokens of 96 frames, and 64 frames more for every hour.
    clip:   the CLIP model that the vision encoder comes from, a directory or a name on the hub: a frame's score is the
            mean cosine of its tokens with the question, brought to 0..1.
    scorer: instead of that, a signal of which every frame has one number from 0 to 1, such as how likely a small
            vision-language model finds the frame to be of use. The published scorer is one, Qwen2-VL-2B.

    The official version 1: shares are rounded down, and a map becomes a square, or one row taller where that fits. A
    frame whose share is below 1 is dropped. A map is never made larger than it is, where the official code does that;
    where all scores are 0, where it stops, all frames count alike. The official code first asks the model for the
    objects of the question; that is for a scorer to do. Images stay as they are.
    """

    paper = "2503.08689"
    parity = "worked example; no official vectors"
    merges = True

    keep: Keep = 12544 / (96 * 729)
    clip: str = "openai/clip-vit-large-patch14-336"
    scorer: Signal | None = None

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(scope="picture", sees=(self.scorer or QuestionLikeness(self.clip),))]

    def count(self, step: Step, span: Span) -> Count:
        return (0, min(span.current, span.keep(self.keep))) if span.film else span.current

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if not tokens.span.film:
            return tokens.everything()
        values = [torch.as_tensor(value).float().mean() for value in tokens.each(step.sees[0])]
        scores = torch.stack(values) if self.scorer else (torch.stack(values) + 1) / 2
        grid, frames = tokens.span.tiles[0].grid, len(tokens.span.tiles)
        places = (tokens.tile * len(grid) + tokens.place).argsort().view(frames, len(grid))
        index, rows, source, start = [], [], torch.full_like(tokens.index, -1), 0
        for own, share in zip(places, shares(scores, tokens.span.keep(self.keep)), strict=True):
            if not share:
                continue
            small = scaled(grid, share)
            centres, cell = (each.to(own.device) for each in grid.cells(small))
            image = tokens.features[own].float().T.view(1, -1, grid.height, grid.width)
            resized = interpolate(image, (small.height, small.width), mode="bilinear", align_corners=False)
            index.append(own[centres])
            rows.append(resized.flatten(2)[0].T)
            source[own] = start + cell
            start += len(small)
        if not index:
            return Selection(tokens.index[:0])
        return Selection(torch.cat(index), torch.cat(rows).to(tokens.features.dtype), source)


def shares(scores: Tensor, budget: int) -> list[int]:
    """How many tokens of the ``budget`` every frame has, by the squares of the ``scores`` (frames,), rounded down."""
    squares = [score**2 for score in scores.tolist()]
    total = sum(squares)
    return [int(budget * (square / total if total else 1 / len(squares))) for square in squares]


def scaled(grid: Grid, count: int) -> Grid:
    """A square of at most ``count`` tokens, or one row taller where that fits; never larger than ``grid``."""
    side = math.isqrt(count)
    height = side + 1 if (side + 1) * side <= count else side
    return Grid(min(height, grid.height), min(side, grid.width))
