"""VisionZip, arXiv 2412.04467."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokenreduce.reducer import (
    AtEncoderOutput,
    Geometry,
    Keep,
    Layer,
    Selection,
    Step,
    TokenReducer,
    VisualTokens,
    best,
    tokens_to_keep,
)
from tokenreduce.signals import ClassToken, EncoderAttention


@dataclass(frozen=True)
class VisionZip(TokenReducer):
    """Keep the class token and the patches that it attends to, and merge the others around evenly spread ones."""

    keep: Keep = 64
    contextual: Keep = 10 / 64
    layer: Layer = -2

    def steps(self, geometry: Geometry) -> list[Step]:
        sees = (EncoderAttention(self.layer), *([ClassToken()] if geometry.class_token else []))
        return [AtEncoderOutput(self.keep, sees)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        kept = tokens_to_keep(self.keep, tokens.span.entered)
        contextual = tokens_to_keep(self.contextual, kept, "round")
        attention = tokens[EncoderAttention(self.layer)]
        class_token = attention.class_token
        passed_on = int(class_token is not None)

        significance = attention.mean(class_token)[0] if passed_on else attention.mean().mean(dim=0)
        dominant = best(significance, kept - contextual - passed_on)

        rest = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, dominant, False).nonzero()[:, 0]
        stride = max(1, len(rest) // contextual)
        is_target = torch.zeros(len(rest), dtype=torch.bool)
        is_target[torch.arange(contextual) * stride] = True
        targets, others = rest[is_target], rest[~is_target]
        nearest = self._cosine(attention.keys.mean(dim=0)[attention.visual], others, targets).argmax(dim=1)

        members = one_hot(nearest, contextual).T.to(tokens.features.dtype)
        sums = members @ tokens.features[others]
        merged = tokens.features[targets] + sums / members.sum(dim=1, keepdim=True).clamp(min=1)

        source = torch.empty(len(tokens), dtype=torch.long)
        source[dominant] = torch.arange(len(dominant)) + passed_on
        source[targets] = torch.arange(contextual) + kept - contextual
        source[others] = nearest + kept - contextual
        front = [tokens[ClassToken()][None]] if passed_on else []
        return Selection(
            torch.cat([torch.full((passed_on,), -1), dominant, targets]),
            torch.cat([*front, tokens.features[dominant], merged]),
            source,
        )

    @staticmethod
    def _cosine(metric: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        unit = metric / metric.norm(dim=-1, keepdim=True)
        return unit[rows] @ unit[columns].T
