"""FlowCut (arXiv 2505.19536), the encoder stage: cut where little information flows, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.reducer import AtEncoder, Count, Geometry, Keep, Selection, Span, Step, TokenReducer, VisualTokens
from tokenreduce.signals import Attention, EncoderAttention


@dataclass(frozen=True)
class FlowCut(TokenReducer):
    """In every second encoder layer, drop the patches through which least information flowed so far.

    The last layer before the one that gives the features reaches ``keep``; how many go in the layers before depends on
    the picture alone, so that no picture's answer depends on its neighbours. The official code takes the most of a
    batch for all of it: with one picture a call it does the same as this, with more it keeps other patches. Without
    class token the mean query takes its place, as the authors do for Qwen2-VL. Their second stage, in the language
    model of any-resolution models, is not part of this. Presets: flowcut_64, flowcut_128 and flowcut_192, the published
    budgets.
    """

    paper = "2505.19536"
    parity = "official vectors, 4 cases; 1 inside a real tower, and 1 given its batch's counts"

    keep: Keep = 2 / 9

    def steps(self, geometry: Geometry) -> list[Step]:
        if geometry.feature_layer < 1:
            raise ValueError("FlowCut cuts before the encoder layer that gives the features, which is the first here")
        last = geometry.feature_layer - 1  # a step's stage is how many can still cut after it
        return [
            AtEncoder(layer=layer, keep=self.keep, stage=last - layer, sees=(EncoderAttention(layer),))
            for layer in range(last + 1)
        ]

    def count(self, step: Step, span: Span) -> Count:
        target, remaining = span.keep(self.keep), step.stage
        if span.current <= target or remaining % 2:
            return span.current
        return (target, span.current) if remaining else target

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        target, remaining = tokens.span.keep(self.keep), step.stage
        if len(tokens) <= target:
            return tokens.everything(tokens.carried)
        looked_at, flow = self.flow(tokens[step.sees[0]])
        total = flow if tokens.carried is None else 0.5 * tokens.carried + 0.5 * flow
        if remaining % 2:
            return tokens.everything(total)
        kept = tokens.best(total, max(target, len(tokens) - pruned(looked_at, remaining, target)))
        return Selection(kept, carry=total[kept])

    @staticmethod
    def flow(attention: Attention) -> tuple[Tensor, Tensor]:
        """What the class token looks at, and every patch's score."""
        values = attention.values.float()
        if (place := attention.class_token) is None:
            mean_query = replace(attention, queries=attention.queries.mean(dim=1, keepdim=True), mask=None)
            looked_at = mean_query.mean(queries=0)[0]
            return looked_at, looked_at * strength(values[:, attention.visual].mean(dim=0))
        looked_at = attention.mean(place)[0]
        likeness = torch.einsum("h d, h n d -> h n", values[:, place], values).softmax(dim=-1)
        return looked_at, score(looked_at, likeness.mean(dim=0)[attention.visual], values.mean(dim=0)[attention.visual])


def score(looked_at: Tensor, likeness: Tensor, values: Tensor) -> Tensor:
    """``(a / sum a + s / sum s) * d`` for patches ``(n,)``, ``(n,)`` and head-averaged values ``(n, head_dim)``."""
    return (looked_at / looked_at.sum() + likeness / likeness.sum()) * strength(values)


def strength(values: Tensor) -> Tensor:
    return values.abs().sum(dim=-1)


def pruned(looked_at: Tensor, remaining: int, target: int) -> int:
    """How many patches to drop: more when attention is concentrated, and the more the fewer layers remain."""
    excess = len(looked_at) - target
    if remaining == 0:
        return excess
    probability = looked_at / looked_at.sum()
    entropy = -torch.xlogy(probability, probability).sum() / torch.tensor(float(len(looked_at))).log()
    return round(float(excess / remaining**0.5 * (1 - entropy**2)))
