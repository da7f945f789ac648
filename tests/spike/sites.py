"""Sites and signals that the core does not have yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokenreduce.reducer import Layer, Selection, Step
from tokenreduce.signals import Attention


@dataclass(frozen=True)
class AtEncoder(Step):
    """Inside the vision encoder: after the attention of ``layer``, before its MLP, or after the whole block.

    The class token stays in the sequence and is not among the tokens that are shown.
    """

    layer: Layer = 0
    where: Literal["attention", "block"] = "block"


@dataclass(frozen=True)
class AtEncoderOutput(Step):
    """Between the vision encoder and the projector, on the features that the projector will take."""


@dataclass(frozen=True)
class AtDecoder(Step):
    """The input of one layer of the language model, in prefill. Sees all of a sample's visual tokens."""

    layer: Layer = 0


@dataclass(frozen=True)
class ClassToken:
    """The class token's feature at this site: ``(dim,)``."""


@dataclass(frozen=True)
class TokenSizes:
    """How many tokens were merged into each token so far: ``(tokens,)``, ones at first."""


@dataclass(frozen=True)
class DecoderAttention:
    """Self-attention of a decoder layer that has run, as a :class:`DecoderView`."""

    layer: Layer


@dataclass(frozen=True)
class LookAheadAttention:
    """The attention that the layer at whose input the step stands would pay, on the states entering it."""


@dataclass(frozen=True)
class ProjectedFeatures:
    """All visual tokens as they entered the language model: ``(entered, dim)``."""


@dataclass(frozen=True)
class TextEmbeddings:
    """The input embeddings of the prompt's tokens behind the last visual token: ``(text, dim)``."""


@dataclass(frozen=True)
class DecoderView(Attention):
    """Attention in the language model; ``text`` (text,) are the places of :class:`TextEmbeddings` in the sequence."""

    text: Tensor = field(default_factory=lambda: torch.empty(0), kw_only=True)


@dataclass
class Merged(Selection):
    """A selection that also says how many original tokens each row holds: ``size`` (k,).

    -1 in ``index`` is a row that stands for none of the tokens shown, such as the class token passed on.
    """

    size: Tensor | None = None


def everything(count: int, carry: object = None) -> Selection:
    """Keep all tokens: a step that only looks."""
    return Selection(torch.arange(count), carry=carry)
