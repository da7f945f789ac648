"""What a reducer may ask to see, and the views that it is handed.

A signal is a small frozen dataclass that a step lists in ``sees``; ``tokens[signal]`` gives its value. Nothing is
computed before that, and no full attention map is ever held for all heads at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.reducer import Layer

Rows = int | slice | Tensor
"""Places in a sequence: one index, a slice, or a long tensor of indices."""


@dataclass(frozen=True)
class EncoderAttention:
    """Self-attention of one layer of the vision encoder, as an :class:`Attention`. ``-2`` is LLaVA's feature layer."""

    layer: Layer = -2


@dataclass(frozen=True)
class EncoderHidden:
    """The patches' hidden states after one layer of the vision encoder: ``(tokens, dim)``; the mean over a token's
    patches where it has several."""

    layer: Layer = -2


@dataclass(frozen=True)
class ClassToken:
    """The class token's feature in the layer that the projector takes its features from: ``(dim,)``."""


@dataclass(frozen=True)
class TokenSizes:
    """How many tokens were merged into each token so far: ``(tokens,)``, ones at first."""


@dataclass(frozen=True)
class QuestionLikeness:
    """Cosines of every visual token with every segment of the question that is asked about the picture, in the space
    that the two towers of a CLIP model share: ``(tokens, segments)``, float32. A segment is what the text tower takes
    at once; most questions are one.

    clip: the CLIP model that the vision encoder comes from: a directory, or a name on the hub. It is loaded when first
          asked for.
    """

    clip: str


@dataclass(frozen=True)
class DecoderAttention:
    """Self-attention of one layer of the language model in prefill, as an :class:`Attention`."""

    layer: Layer


@dataclass(frozen=True)
class LookAheadAttention:
    """The attention that the decoder layer at whose input the step stands would pay to the states as they are now."""


@dataclass(frozen=True)
class DecoderHidden:
    """A sample's whole sequence at the step's decoder layer: ``(sequence, dim)``; ``normed`` by the final norm."""

    normed: bool = False


@dataclass(frozen=True)
class ProjectedFeatures:
    """A sample's visual tokens as they entered the language model: ``(entered, dim)``."""


@dataclass(frozen=True)
class TextEmbeddings:
    """The input embeddings of the tokens behind a sample's last visual token: ``(text, dim)``."""


@dataclass(frozen=True)
class Attention:
    """A view on one attention layer for one sequence; probabilities are computed for the rows that are asked for, in
    float32.

    queries: ``(heads, queries, head_dim)``
    keys:    ``(key_heads, keys, head_dim)``; fewer heads than queries under grouped-query attention
    values:  ``(key_heads, keys, head_dim)``
    scale:   what the dot products are multiplied by
    mask:    ``(queries, keys)``, added to the scaled dot products when floating point, allowed places when bool; or
    None
    visual:  where the visual tokens stand in the sequence of keys (a class token or text may stand before them);
             ``(tokens, group)`` where a visual token is made of several patches
    class_token: the class token's place, or None where the encoder has none
    causal:  whether a query sees only the keys up to its own place
    text:    where the text behind the last visual token stands, or None in a vision encoder
    softcap: the bound that a tanh puts on the scores before the mask, or None
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    visual: Rows
    class_token: int | None = None
    mask: Tensor | None = None
    causal: bool = False
    text: Tensor | None = None
    softcap: float | None = None

    def scores(self, queries: Rows) -> Tensor:
        """Scaled and masked dot products before the softmax: ``(heads, rows, keys)``."""
        return torch.cat([self._scores(head, queries) for head in range(self.queries.shape[0])])

    def rows(self, queries: Rows) -> Tensor:
        """Attention probabilities of some queries over the whole sequence: ``(heads, rows, keys)``."""
        return self.scores(queries).softmax(-1)

    def mean(self, queries: Rows | None = None, keys: Rows | None = None) -> Tensor:
        """Attention probabilities averaged over heads: ``(queries, keys)``, by default among the visual tokens.

        The softmax always runs over the whole sequence; heads are added one after the other. Of a group of patches the
        mean counts, as queries and as keys.
        """
        rows = _many(self.visual if queries is None else queries)
        columns = _many(self.visual if keys is None else keys)
        grouped = isinstance(rows, Tensor) and rows.ndim == 2
        each = rows.flatten() if grouped else rows  # type: ignore[union-attr]
        total = self._scores(0, each)[0].softmax(-1)
        for head in range(1, self.queries.shape[0]):
            total += self._scores(head, each)[0].softmax(-1)
        mean = (total / self.queries.shape[0])[:, columns]
        mean = mean.mean(-1) if mean.ndim == 3 else mean
        return mean.unflatten(0, rows.shape).mean(1) if grouped else mean  # type: ignore[union-attr]

    def _scores(self, head: int, queries: Rows) -> Tensor:
        """One head's logits in float32: ``(1, rows, keys)``."""
        queries = _many(queries)
        groups = self.queries.shape[0] // self.keys.shape[0]
        logits = (self.queries[head][queries].float() * self.scale) @ self.keys[head // groups].float().T
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        if self.mask is not None:
            rows = self.mask[queries]
            logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows
        if self.causal:
            places = torch.arange(self.keys.shape[1], device=logits.device)
            logits = logits.masked_fill(places > places[queries][:, None], -torch.inf)
        return logits[None]


def _many(rows: Rows) -> slice | Tensor:
    """One place as a stretch of one, so that no dimension is lost."""
    return slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
