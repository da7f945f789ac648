"""VidCom2 (arXiv 2505.14454): more tokens of frames unlike the video, and of each frame those least like the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import (
    AtProjector,
    Count,
    Geometry,
    Keep,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    merge,
)


@dataclass(frozen=True)
class VidCom2(TokenReducer):
    """Keep more tokens of frames that are unlike the video, and of each frame those least like frame and video.

    keep:  the official retention ratio. A frame keeps a share between this times ``1 - 1 / frames`` and this times
           ``2 - 1 / frames``, rounded half to even, and at least one token.
    exact: True for vLLM's count, known beforehand: ``keep`` of the video's tokens, rounded down, but one for every
           frame. Then the kept tokens most like the video are dropped, or the dropped ones least like it taken back,
           wherever they are; a frame may lose all. vLLM's rate q is ``keep=1 - q``, binary error included.

    A video is compared within itself alone, on the half of the channels that varies least over it. An image, also one
    that is cut up, is a video of one frame, whose share is ``keep``; the official code leaves images whole. Everything
    is in float32, whatever the model's type. Newlines stay where the family has them; the official code for LLaVA-Video
    puts those of a frame behind its tokens. Presets: vidcom2_r25 and vidcom2_r15, the published ratios;
    vidcom2_qwen_r25, where survivors keep their positions; vidcom2_vllm_r25, likewise exact.
    """

    paper = "2505.14454"
    parity = "official vectors, 8 cases; 5 of vLLM's"

    keep: Keep = 0.25
    exact: bool = False

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(scope="picture")]

    def count(self, step: Step, span: Span) -> Count:
        total, share = span.current, self.share(span.current)
        sizes = [total] if span.cut_up else [len(grid) for grid in span.grids]
        if self.exact:
            return min(total, max(len(sizes), int(total * share)))
        if len(sizes) == 1:
            return int(budgets(torch.ones(1), torch.tensor([total]), share))
        rest = share * (1 - 1 / len(sizes))
        # One frame may have all that is shared out beyond the least, and rounding takes less than a token of each.
        most = rest * total + share * max(sizes) + len(sizes)
        least = 1 if total < sum(sizes) else sum(max(1, round(rest * size - 0.01)) for size in sizes)
        return min(total, least), min(total, int(most))

    def share(self, tokens: int) -> float:
        """``keep`` as a ratio of so many tokens."""
        return self.keep if isinstance(self.keep, float) else min(1.0, self.keep / max(1, tokens))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        frame = torch.zeros_like(tokens.tile) if tokens.span.cut_up else tokens.tile
        _, frame, sizes = frame.unique(return_inverse=True, return_counts=True)
        video_score, frame_score = likeness(tokens.features.float(), frame, len(sizes))
        unlike = -merge(video_score[:, None], frame, len(sizes))[:, 0]
        allowed = budgets(((unlike - unlike.max()) / 0.01).softmax(0), sizes, self.share(len(tokens)))
        score = video_score + frame_score
        order = score.argsort(stable=True)
        by_frame = order[frame[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[by_frame] = torch.arange(len(tokens), device=rank.device) - (sizes.cumsum(0) - sizes)[frame[by_frame]]
        dropped = rank >= allowed[frame]
        if self.exact:
            return Selection(order[dropped[order].argsort(stable=True)][: tokens.keep].sort().values)
        return Selection((~dropped).nonzero()[:, 0])


def likeness(features: Tensor, frame: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """How like the video, and how like its frame, every token (tokens, dim) is, at most 5: ``(tokens,)`` each.

    ``frame`` (tokens,) says which of ``frames`` each is of.
    """
    variance = features.var(dim=0, correction=0)
    steady = variance.argsort(stable=True)[: max(1, features.shape[1] // 2)]
    unit = normalize(features[:, steady], dim=-1)
    return gaussians(unit, unit.mean(dim=0)), gaussians(unit, merge(unit, frame, frames)[frame])


def gaussians(rows: Tensor, centres: Tensor) -> Tensor:
    """The sum of five Gaussians of different width of every row's distance to its centre: ``(rows,)``."""
    squared = (rows - centres).square().sum(dim=-1, keepdim=True)
    widths = rows.new_tensor([0.125, 0.25, 0.5, 1, 2])
    return (-squared / (2 * widths)).exp().sum(dim=-1)


def budgets(weights: Tensor, sizes: Tensor, share: float) -> Tensor:
    """How many tokens each frame keeps of its own ``sizes``, the more the higher its weight: ``(frames,)`` long."""
    return (scales(weights, share) * sizes).round().clamp(min=1).long()


def scales(weights: Tensor, share: float) -> Tensor:
    """Which part of its tokens each frame keeps: ``share`` on average, and 1 at most."""
    return (share * (1 + weights - weights.mean())).clamp(max=1)
