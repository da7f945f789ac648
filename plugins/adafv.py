"""AdaFV (arXiv 2501.09532): as many salient tokens, and as many that the question names, as suits the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Layer, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.signals import EncoderAttention, QuestionEmbeddings


@dataclass(frozen=True)
class AdaFv(TokenReducer):
    """Keep the most salient tokens and those most like the question, in the proportion that serves both best.

    Salient is what the class token attends to; in an encoder without one, what all tokens attend to. Both scores are
    made shares that sum to 1 over all pictures of a prompt. Of all splits of ``keep`` into the most salient tokens and,
    of the others, those most like the question, that one is taken whose tokens hold the largest product of the shares.

    temperature: of the softmax that makes likenesses shares; None for the one at which they are as concentrated as the
                 salient ones, by entropy.
    aggregate:   whether a token is like the question by its likest word or by the mean of all.
    layer:       the encoder layer whose attention is looked at.

    A reconstruction: there is no official code, and the paper's abstract does not say how likenesses become shares,
    which text embeddings are compared (here the question's in the language model's table, with projected tokens) and
    what exactly is maximised. Without a word in the question the salient tokens stay. Presets: adafv_r05, adafv_r10 and
    adafv_r25, within the range that the paper studies.
    """

    paper = "2501.09532"
    parity = "worked examples of a reconstruction; no official code"

    keep: Keep = 0.1
    temperature: float | None = None
    aggregate: Literal["max", "mean"] = "max"
    layer: Layer = -2

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(EncoderAttention(self.layer), QuestionEmbeddings()), scope="sample")]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention, question = step.sees
        salience = torch.cat([view.received() for view in tokens.each(attention)])
        salience = salience / salience.sum()
        words = tokens[question]
        if not len(words):
            return Selection(tokens.best(salience))
        cosines = normalize(tokens.features.float(), dim=-1) @ normalize(words.float(), dim=-1).T
        likeness = cosines.amax(dim=-1) if self.aggregate == "max" else cosines.mean(dim=-1)
        relevance = (
            shares(likeness, salience) if self.temperature is None else (likeness / self.temperature).softmax(-1)
        )
        return Selection(tokens.best(mixed(salience, relevance, tokens.keep)))


def shares(likeness: Tensor, like: Tensor) -> Tensor:
    """The softmax of ``likeness`` (n,) at the temperature at which its entropy is that of the shares ``like`` (n,), as
    nearly as one from 0.0001 to 10000 makes it."""
    entropy = torch.special.entr(like).sum()
    low, high = likeness.new_tensor(-4), likeness.new_tensor(4)
    for _ in range(40):  # beyond the precision of float32
        middle = (low + high) / 2
        spread = torch.special.entr((likeness / 10**middle).softmax(-1)).sum() > entropy
        low, high = torch.where(spread, low, middle), torch.where(spread, middle, high)
    return (likeness / 10 ** ((low + high) / 2)).softmax(-1)


def mixed(salience: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Which ``count`` tokens are kept: ``(n,)``, 1 for these and 0 for others.

    Of the splits with equal products that with fewer salient tokens is taken.
    """
    salient, relevant = (each.sort(descending=True, stable=True).indices for each in (salience, relevance))
    rank = torch.empty_like(salient).scatter_(0, salient, torch.arange(len(salient), device=salient.device))

    def split(first: int | Tensor) -> Tensor:
        """The ``first`` salient tokens, and of the others the most relevant."""
        others = rank[relevant] >= first
        taken = ~others | (others.cumsum(0) <= count - first)
        return torch.zeros_like(salience, dtype=torch.double).scatter_(0, relevant, taken.double())

    both = torch.stack([salience, relevance], dim=1).double()
    products = torch.stack([(split(first) @ both).prod() for first in range(count + 1)])
    return split(products.argmax())
