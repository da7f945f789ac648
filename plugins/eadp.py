"""EADP (ECCV 2026): tokens that together cover the picture, weighted by what the telling words of the question say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, normalize, pad

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
    cover,
)
from tokenreduce.signals import ClipSpace, QuestionEmbeddings


@dataclass(frozen=True)
class Eadp(TokenReducer):
    """Keep the tokens that best cover those that the question's most telling words, and all of it, relate to.

    A token's relevance is a mixture of negated cosines: with the question as a whole, and with its words of the lowest
    entropy over the picture. It is smoothed over the grid, and says how much the token needs to be covered.

    clip:  the CLIP model that the vision encoder comes from, a directory or a name on the hub: its text tower reads the
           question. None for the official variant for Qwen, which compares the language model's own embeddings of the
           question with the visual tokens as they enter it.
    alpha: the share of the question as a whole, from 0 to 1.
    beta:  the power that relevance is raised to, 1 for LLaVA, 2 for Qwen and videos.
    entropy_keep_ratio: the share of the words that tell, at least one of them.

    ``keep`` is of a whole picture, where the official code for LLaVA asks for so many tokens a tile. With CLIP every
    tile has its part by its relevance, rounded down, but 1 at least, so that of several fewer tokens may stay than
    ``keep`` says. All places of CLIP's text tower are words here, padding too, as in the official code. Each tile is
    smoothed on its own grid, unless it lost tokens before or is a single line of them. Presets: eadp_32, eadp_64 and
    eadp_128 for LLaVA-1.5; eadp_qwen_128, eadp_qwen_256 and eadp_qwen_512.
    """

    paper = "EADP, ECCV 2026"
    parity = "official vectors, 8 cases"

    keep: Keep = 1 / 9
    clip: str | None = "openai/clip-vit-large-patch14-336"
    alpha: float = 0.5
    beta: float = 1.0
    entropy_keep_ratio: float = 0.2

    def steps(self, geometry: Geometry) -> list[Step]:
        text = QuestionEmbeddings() if self.clip is None else ClipSpace(self.clip)
        return [AtProjector(keep=self.keep, sees=(text,), scope="picture")]

    def count(self, step: Step, span: Span) -> Count:
        most, tiles = min(span.keep(self.keep), span.current), len(span.tiles)
        return most if self.clip is None or tiles == 1 else (1, min(most + tiles - 1, span.current))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        tiles = [(tokens.tile == number).nonzero()[:, 0] for number in range(len(tokens.span.tiles))]
        weights = self.importance(step, tokens, tiles)
        if not tokens.adaptive:
            return Selection(covering(tokens.features, weights, tokens.keep).sort().values)
        total = tokens.span.keep(self.keep)
        shares = torch.stack([weights[tile].sum() for tile in tiles]) / (weights.sum() + 1e-6)
        kept = []
        for tile, share in zip(tiles, shares.tolist(), strict=True):
            quota = min(max(1, math.floor(share * total)), len(tile))
            kept.append(tile[covering(tokens.features[tile], weights[tile], quota)])
        return Selection(torch.cat(kept).sort().values)

    def importance(self, step: Step, tokens: VisualTokens, tiles: list[Tensor]) -> Tensor:
        """How much every token needs to be covered: ``(n,)``; ``tiles`` are the places of each tile's tokens."""
        (signal,) = step.sees
        if self.clip is None:
            words = tokens[signal].float()
            scores = self.relevance(tokens.features, words, words.mean(dim=0))
        else:
            scores = torch.cat(
                [
                    torch.stack(
                        [self.relevance(space.patches, *text) for text in zip(space.segments, space.text, strict=True)]
                    ).mean(dim=0)
                    for space in tokens.each(signal)
                ]
            )
        low, high = scores.min(), scores.max()
        scaled = (scores - low + 1e-6) / (high - low + 1e-6)
        for tile, places in zip(tokens.span.tiles, tiles, strict=True):
            scaled[places] = smoothed(scaled[places], tile.grid)
        return scaled**self.beta

    def relevance(self, visual: Tensor, words: Tensor, whole: Tensor) -> Tensor:
        """What ``words`` (text, dim) and the ``whole`` question (dim,) say of every token: ``(n,)``."""
        unit = normalize(visual.float(), dim=-1)
        unlike = -normalize(words, dim=-1) @ unit.T
        entropy = torch.special.entr((100 * unlike).softmax(dim=-1)).sum(dim=-1)
        telling = entropy.sort(stable=True).indices[: max(1, int(len(words) * self.entropy_keep_ratio))]
        local = (-entropy[telling] / (0.01 + 1e-6)).softmax(dim=-1) @ unlike[telling]
        return self.alpha * -(unit @ normalize(whole, dim=-1)) + (1 - self.alpha) * local


def smoothed(values: Tensor, grid: Grid) -> Tensor:
    """The values ``(n,)`` of a whole grid, blurred by a Gaussian of one token, over three, mirrored at the edges."""
    if len(values) != len(grid) or min(grid.height, grid.width) < 2:
        return values
    line = (-torch.tensor([1.0, 0, 1], device=values.device) / 2).exp()
    kernel = torch.outer(line, line) / line.sum() ** 2
    plane = pad(values.view(1, 1, grid.height, grid.width), (1, 1, 1, 1), mode="reflect")
    return conv2d(plane, kernel[None, None]).flatten()


def covering(features: Tensor, weights: Tensor, count: int) -> Tensor:
    """The places of ``count`` tokens, in the order of picking, by whose cosines, from 0 to 1, all are covered best."""
    unit = normalize(features.float(), dim=-1)
    return cover((unit @ unit.T).add_(1).div_(2), count, weights)
