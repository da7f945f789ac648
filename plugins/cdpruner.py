"""CDPruner (arXiv 2506.10967): the most diverse tokens, given the question, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.signals import QuestionLikeness


@dataclass(frozen=True)
class CdPruner(TokenReducer):
    """Keep the most diverse tokens, given how relevant each is to the question.

    clip: the CLIP model that the vision encoder comes from, a directory or a name on the hub: its text tower reads the
          question, which ``reduce_tokens(..., question=)`` takes.
    sign: -1 as in the official code: with the patch features of LLaVA's CLIP, tokens *unlike* the question are the
          relevant ones; other encoders want 1.

    Relevance is scaled within one image or tile, where the official code takes all of a call together. Where more
    tokens are asked for than the kernel has dimensions, the official code gives NaN, and this one goes on picking.
    Presets: cdpruner_64, cdpruner_128 and cdpruner_192, the published budgets.
    """

    paper = "2506.10967"
    parity = "official vectors, 5 cases"

    keep: Keep = 1 / 9
    clip: str = "openai/clip-vit-large-patch14-336"
    sign: Literal[-1, 1] = -1

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(QuestionLikeness(self.clip),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        relevance = scaled(self.sign * tokens[step.sees[0]].mean(dim=-1))
        unit = normalize(tokens.features, dim=-1).float()
        return Selection(diverse(unit, relevance, tokens.keep).sort().values)


def scaled(relevance: Tensor) -> Tensor:
    """Relevance from about 0 to 1; all 1 where nothing tells the tokens apart."""
    low, high = relevance.min(), relevance.max()
    return ((relevance - low + 1e-6) / (high - low)).where(high > low, 1.0)


def diverse(unit: Tensor, relevance: Tensor, count: int) -> Tensor:
    """The places of ``count`` tokens, in the order in which greedy MAP inference picks them.

    The kernel is the likeness of ``unit`` (tokens, dim) weighted by ``relevance`` (tokens,) on both sides. Where the
    official code computes it and its Cholesky factor, a row a pick, this makes an orthonormal basis of the picked
    tokens, a direction a pick: what the tokens have along a direction is that row of the factor.
    """
    weighted = relevance[:, None] * unit
    gain = weighted.square().sum(dim=-1)
    basis = weighted.new_zeros(count, weighted.shape[1])
    picked = torch.empty(count, dtype=torch.long, device=unit.device)
    for step in range(count):
        best = gain.argmax(keepdim=True)
        token = weighted[best][0]
        basis[step] = normalize(token - basis[:step] @ token @ basis[:step], dim=0)
        picked[step : step + 1] = best
        gain = (gain - (weighted @ basis[step]).square()).clamp(min=0).index_fill(0, picked[: step + 1], -torch.inf)
    return picked
