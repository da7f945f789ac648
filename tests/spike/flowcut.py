"""FlowCut, arXiv 2505.19536: the encoder stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.reducer import (
    AtEncoder,
    Geometry,
    Keep,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    best,
    layer_index,
    tokens_to_keep,
)
from tokenreduce.signals import Attention, EncoderAttention


@dataclass(frozen=True)
class AtFlow(AtEncoder):
    """A step that knows how many layers are left before the features are taken."""

    remaining: int = 0


@dataclass(frozen=True)
class FlowCut(TokenReducer):
    """In every second encoder layer, drop the patches through which least information flowed so far."""

    keep: Keep = 128

    def steps(self, geometry: Geometry) -> list[Step]:
        depth = layer_index(-2, geometry.encoder_layers)
        return [
            AtFlow(self.keep, (EncoderAttention(layer),), layer, remaining=depth - layer - 1) for layer in range(depth)
        ]

    def count(self, step: Step, span: Span) -> int | None:
        assert isinstance(step, AtFlow)
        target = tokens_to_keep(self.keep, span.entered)
        if span.current <= target or step.remaining % 2:
            return span.current
        return None if step.remaining else target

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        assert isinstance(step, AtFlow)
        target = tokens_to_keep(self.keep, tokens.span.entered)
        if len(tokens) <= target:
            return everything(len(tokens), tokens.carried)
        looked_at, flow = self._flow(tokens[step.sees[0]])
        total = flow if tokens.carried is None else 0.5 * tokens.carried + 0.5 * flow
        if step.remaining % 2:
            return everything(len(tokens), total)
        kept = best(total, max(target, len(tokens) - pruned(looked_at, step.remaining, target)))
        return Selection(kept, carry=total[kept])

    @staticmethod
    def _flow(attention: Attention) -> tuple[Tensor, Tensor]:
        """What the class token looks at, and every patch's score; the mean query replaces a missing class token."""
        if (place := attention.class_token) is None:
            mean_query = replace(attention, queries=attention.queries.mean(dim=1, keepdim=True), mask=None)
            looked_at = mean_query.mean(queries=0)[0]
            return looked_at, looked_at * strength(attention.values[:, attention.visual].mean(dim=0))
        looked_at = attention.mean(place)[0]
        likeness = torch.einsum("h d, h n d -> h n", attention.values[:, place], attention.values).softmax(dim=-1)
        values = attention.values.mean(dim=0)[attention.visual]
        return looked_at, score(looked_at, likeness.mean(dim=0)[attention.visual], values)


def everything(count: int, carry: Tensor | None) -> Selection:
    """Keep all tokens: a step that only looks."""
    return Selection(torch.arange(count), carry=carry)


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
