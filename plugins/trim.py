"""TRIM (arXiv 2409.10994): the tokens that CLIP relates to the question, and the mean of all others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.reducer import (
    AtEncoderOutput,
    Count,
    Geometry,
    Keep,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.signals import Clip, ClipSpace


@dataclass(frozen=True)
class Trim(TokenReducer):
    """Keep the tokens that CLIP relates to the question, and one more row that is the mean of all others.

    Tokens are ranked by the plain product of their CLIP projection with the question's, the lowest first: the official
    code negates it, as CDPruner's does.

    keep: a number counts all rows, the mean's included; a ratio is the official one, of the tokens besides the mean,
          ``int(ratio * tokens)`` of them. None, the official default, keeps as many as stand out: the share of tokens
          whose softmax is more than 1.5 interquartile ranges above the third quartile.
    clip: the CLIP model that the vision encoder comes from, a directory or a name on the hub: its text tower reads the
          question, which ``reduce_tokens(..., question=)`` takes, up to its greatest length.

    What stands out is counted within one image or tile, where the official code takes all of a call together. Where
    every token is kept there is no mean of others, and the official code stops with an error. Rows keep the model's
    type, where the official code makes them float16. Presets: trim_r20, the official example of a ratio.
    """

    paper = "2409.10994"
    parity = "official vectors, 4 cases"
    merges = True

    keep: Keep | None = None
    clip: str = "openai/clip-vit-large-patch14-336"

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtEncoderOutput(sees=(ClipSpace(self.clip, truncate=True),))]

    def count(self, step: Step, span: Span) -> Count:
        return (1, span.current) if self.keep is None else min(self._chosen(self.keep, span) + 1, span.current)

    def with_keep(self, keep: Keep) -> Trim:
        return replace(self, keep=keep)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        scores = -products(tokens[step.sees[0]])
        count = outliers(scores.softmax(dim=-1)) if self.keep is None else self._chosen(self.keep, tokens.span)
        if count >= len(tokens):
            return tokens.everything()
        kept = tokens.best(scores, count)
        rest = tokens.others(kept)
        mean = tokens.features[rest].float().mean(dim=0, keepdim=True).to(tokens.features.dtype)
        source = torch.full_like(scores, count, dtype=torch.long)
        source[kept] = torch.arange(count, device=kept.device)
        index = torch.cat([kept, kept.new_tensor([-1])])
        return Selection(index, torch.cat([tokens.features[kept], mean]), source)

    def _chosen(self, keep: Keep, span: Span) -> int:
        """How many tokens stay besides the mean of the others, if there are others."""
        return int(span.entered * keep) if isinstance(keep, float) else keep - (keep < span.current)


def products(space: Clip) -> Tensor:
    """The product of every visual token with the question: ``(tokens,)``."""
    return space.patches @ space.text[0]


def outliers(shares: Tensor) -> int:
    """How many tokens of each picture stand out, of softmaxes ``(..., tokens)`` that are pooled."""
    low, high = torch.quantile(shares, shares.new_tensor([0.25, 0.75]))
    share = float((shares > high + 1.5 * (high - low)).double().mean())
    return int(shares.shape[-1] * share)
