"""What tokenreduce must know about a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenreduce.reducer import Geometry, Grid, Step

Inputs = Mapping[str, Any]
"""The keyword arguments of a model call, as a processor made them."""


class ModelFamily(ABC):
    """Where a model's visual tokens, layers and packing are. One instance serves one model; subclasses hold no other
    state.

    ``classes`` names the transformers classes of the family and ``sites`` the kinds of step that it can host.
    """

    classes: ClassVar[tuple[str, ...]]
    sites: ClassVar[tuple[type[Step], ...]]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """Depths, and whether the encoder has a class token."""

    @property
    @abstractmethod
    def placeholder(self) -> int:
        """The token id that stands for a visual token in ``input_ids``."""

    @property
    @abstractmethod
    def vision_inputs(self) -> tuple[str, ...]:
        """The names of the inputs that describe pictures; the language model never sees them."""

    @abstractmethod
    def grids(self, inputs: Inputs) -> list[Grid]:
        """The layout of every image in the call, in the order of the prompts."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The language model's stack: the module that holds ``layers``, ``norm`` and ``rotary_emb``."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """The module that takes the encoder's features ``(images, tokens, dim)`` to the language model's width."""

    @abstractmethod
    def encoder_layers(self) -> Sequence[Any]:
        """The vision encoder's layers."""

    @abstractmethod
    def encoder_attention(self) -> Sequence[nn.Module]:
        """The vision encoder's self-attention modules, one a layer."""

    @abstractmethod
    def encode(self, inputs: Inputs) -> Sequence[Tensor]:
        """The projected features of every image, ``(tokens, dim)`` each."""

    @abstractmethod
    def some(self, inputs: Inputs, images: slice) -> Inputs:
        """The vision inputs of some of the images alone."""

    @abstractmethod
    def fingerprint(self, inputs: Inputs, index: int) -> int:
        """A checksum of one image's pixels: the same in every batch."""

    @abstractmethod
    def resize(self, inputs: Inputs, grids: Sequence[Grid]) -> Inputs:
        """The vision inputs with every image made smaller, so that it gives the grid asked for."""

    @abstractmethod
    def vision_flops(self, tokens: int) -> float:
        """FLOPs of the vision tower and the projector for a picture that gives ``tokens`` visual tokens."""

    def positions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The position ids that the model gives a prompt, last dimension the sequence; 0 at padding."""
        return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def family_of(model: PreTrainedModel, families: Mapping[str, type[ModelFamily]]) -> ModelFamily:
    """The family that serves ``model``. Raises ``ValueError`` for a class that none does."""
    for family in families.values():
        if type(model).__name__ in family.classes:
            return family(model)
    supported = sorted(name for family in families.values() for name in family.classes)
    raise ValueError(f"models of class {type(model).__name__} are not supported; supported: {', '.join(supported)}")
