"""What tokenreduce must know about a family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenreduce.models.recipe import Recipe
from tokenreduce.models.stack import DecoderStack
from tokenreduce.reducer import AtEncoder, Geometry, Grid, Role, Step, Tile

Inputs = Mapping[str, Any]
"""The keyword arguments of a model call, as a processor made them."""

Modality = Literal["image", "video"]


@dataclass(frozen=True)
class EncodedTile:
    """A rectangle of visual tokens within which the vision encoder attends: an image, a tile of one, or a frame.

    grid:     its layout.
    patches:  ``(tokens,)`` long, or ``(tokens, group)`` where the projector makes one token of several patches: where
              its patches stand in its encoder sequence, a class token not counted.
    sequence: which of the encoder's sequences of its modality it is, in the order of the call.
    extent:   its stretch of that sequence where one sequence holds several tiles; None where it has it to itself.
    encoded:  how many patches the encoder's sequence, or stretch of it, has.
    role:     what it shows.
    row, column: where, in tokens, a crop's first token lies in the whole mosaic of its picture's crops; 0 for others.
    time:     the second at which a frame begins, where the model is told it.
    """

    grid: Grid
    patches: Tensor
    sequence: int
    extent: slice | None
    encoded: int
    role: Role = "whole"
    row: int = 0
    column: int = 0
    time: float | None = None

    def described(self, picture: int) -> Tile:
        """What a method may know of it, as a tile of a prompt's ``picture``."""
        return Tile(self.grid, self.role, picture, self.row, self.column, self.time)


@dataclass(frozen=True)
class Picture:
    """One image or video of a call.

    modality: which of the two.
    tiles:    what it consists of.
    tokens:   ``(placeholders,)`` long, the visual token, counted through all tiles, that each of its placeholders in
              the prompt stands for; -1 for a special one, such as a newline or a class token.
    lines:    ``(placeholders,)`` long, the line that each placeholder belongs to: a special one stays while a visual
              token of its line does.
    pixels:   its own pixels.
    """

    modality: Modality
    tiles: tuple[EncodedTile, ...]
    tokens: Tensor
    lines: Tensor
    pixels: Tensor

    @classmethod
    def plain(cls, grid: Grid, pixels: Tensor, sequence: int) -> Picture:
        """An image of one tile, every token of which is one patch and has one placeholder, in raster order."""
        places = torch.arange(len(grid))
        tile = EncodedTile(grid, places, sequence, None, len(grid))
        return cls("image", (tile,), places, torch.zeros_like(places), pixels)


def cut_up(grid: Grid, rows: int, columns: int) -> list[tuple[Role, int, int]]:
    """Role, row and column of every tile of a picture that is cut into ``rows`` x ``columns`` crops of ``grid`` tokens,
    behind which the whole picture comes as a thumbnail; of its one tile where there are no crops.

    >>> cut_up(Grid(2, 4), 1, 2)
    [('crop', 0, 0), ('crop', 0, 4), ('thumbnail', 0, 0)]
    """
    if not rows:
        return [("whole", 0, 0)]
    crops: list[tuple[Role, int, int]] = [
        ("crop", row * grid.height, column * grid.width) for row in range(rows) for column in range(columns)
    ]
    return [*crops, ("thumbnail", 0, 0)]


class ModelFamily(ABC):
    """Where a model's visual tokens, layers and packing are. One instance serves one model; subclasses hold no other
    state.

    classes:     the transformers classes of the family.
    unhosted:    the kinds of step that it cannot host, each with the reason, as the end of a sentence; it hosts all
                 others.
    class_token: whether the vision encoder's sequence begins with one, if only with some of the family's towers.
    configured:  the arguments of a call that stand in for the configuration's setting of the same name.
    needs:       arguments that come with another one, and which.
    """

    classes: ClassVar[tuple[str, ...]]
    unhosted: ClassVar[Mapping[type[Step], str]] = {}
    class_token: ClassVar[bool] = False
    configured: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Mapping[str, str]] = {}

    first_position: ClassVar[int] = 0
    """The position id that a forward call without any gives a prompt's first token."""
    counts_padding: ClassVar[bool] = True
    """Whether such a call gives padding positions of its own, as most models do."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        """Small random-weight checkpoints of the family's classes by name, which the checks of families then take up;
        none by default."""
        return {}

    @classmethod
    def hosts(cls, step: type[Step]) -> bool:
        """True if models of the family can host this kind of step."""
        return step not in cls.unhosted

    # What a model of the family is.

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """Depths, and whether the encoder has a class token."""

    @property
    def placeholders(self) -> Mapping[Modality, int]:
        """The token id that stands for a visual token in ``input_ids``."""
        return {"image": self.model.config.image_token_id}

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        """The names of the inputs that describe pictures; the language model never sees them."""
        return ("pixel_values",)

    @property
    def decoder(self) -> nn.Module:
        """The language model's stack: the module that holds ``layers``, ``norm`` and ``rotary_emb``."""
        return self.model.base_model.language_model

    @property
    def stack(self) -> DecoderStack:
        """The language model's layers."""
        return DecoderStack(self.decoder)

    @property
    def projector(self) -> nn.Module:
        """The module that takes the encoder's features ``(sequences, tokens, dim)`` to the language model's width."""
        return self.model.base_model.multi_modal_projector

    @abstractmethod
    def encoder_layers(self, modality: Modality = "image") -> Sequence[nn.Module]:
        """The vision encoder's layers."""

    def encoder_attention(self, modality: Modality = "image") -> Sequence[nn.Module]:
        """The vision encoder's self-attention modules, one a layer."""
        layers: Sequence[Any] = self.encoder_layers(modality)
        return [layer.self_attn for layer in layers]

    def attention_layer(self, layer: int) -> int:
        """The vision encoder's layer whose attention is shown where that of ``layer`` is asked for: the nearest one
        that reaches over a whole tile."""
        return layer

    def halves(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The norm and the feed-forward network of a vision encoder layer: its second half, behind the attention.
        Asked for only where steps inside the encoder are hosted."""
        raise NotImplementedError

    @property
    def shortens(self) -> bool:
        """True if the rest of the vision encoder and the projector take a sequence that became shorter inside the
        encoder; otherwise a picture stays whole up to the projector's output."""
        return self.hosts(AtEncoder)

    @abstractmethod
    def vision_flops(self, patches: int) -> float:
        """FLOPs of the vision tower and the projector for one encoder sequence of ``patches`` patches."""

    def visual(self, input_ids: Tensor) -> Tensor:
        """Where visual tokens stand, bool as ``input_ids``."""
        return torch.isin(input_ids, input_ids.new_tensor(list(self.placeholders.values())))

    # What a call brings, and what becomes of it.

    def check_call(self, inputs: Inputs) -> None:
        """Raise ``ValueError`` for an argument that the family cannot honour, naming it: one that asks for another
        setting than the configuration's, or lacks one that it comes with."""
        given = {name for name, value in inputs.items() if value is not None}
        for name in given.intersection(self.configured):
            asked, own = inputs[name], getattr(self.model.config, name)
            if _comparable(asked) != _comparable(own):
                raise ValueError(
                    f"{name}={asked!r} is not the model's own setting, {own!r}, by which visual tokens are reduced: "
                    f"set model.config.{name} = {asked!r} before a reducer is attached, and leave the argument out"
                )
        for name, other in self.needs.items():
            if name in given and other not in given:
                raise ValueError(f"{name} came without {other}: pass all that the processor made of the pictures")

    @abstractmethod
    def pictures(self, inputs: Inputs) -> list[Picture]:
        """Every image of the call, and then every video, each in the order of the prompts."""

    @abstractmethod
    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        """For every picture of a modality what stands at its placeholders: the projected features ``(placeholders,
        dim)``, and behind them those that deeper layers add, where the family has such.

        Fewer rows where a step inside the encoder or at its output took some away.
        """

    @abstractmethod
    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        """The vision inputs of some of a modality's pictures alone."""

    def blocks(self, inputs: Inputs) -> Tensor | None:
        """``(rows, length)`` long: tokens of the same block see one another both ways, -1 for those that are in none;
        None where every token sees those before it alone."""
        return None

    def resize(self, inputs: Inputs, grids: Sequence[Grid]) -> Inputs:
        """The vision inputs with every image made smaller, so that it gives the grid asked for. Asked for only where
        steps at the input are hosted."""
        raise NotImplementedError

    def outputs(self, rows: Sequence[Sequence[Tensor]]) -> BaseModelOutputWithPooling:
        """One modality's features in the output that ``generate`` passes on, an entry for every prompt: for each level
        that :meth:`encode` gives, the rows' features."""
        return BaseModelOutputWithPooling(pooler_output=list(rows[0]))

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        """The entries of all prompts in the container that the model's forward call expects."""
        return features

    def positions(self, inputs: Inputs) -> Tensor:
        """The position ids that ``generate`` gives the prompts, last dimension the sequence; 0 at padding."""
        mask = inputs["attention_mask"]
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def _comparable(setting: Any) -> Any:
    """A setting, a list of layers in one form."""
    return list(setting) if isinstance(setting, list | tuple) else setting


_INSIDE = {"get_base_model": "its get_base_model()", "_orig_mod": "its _orig_mod", "module": "its module"}
"""Where the usual wrappers keep the model: adapters, compiled models, parallel ones."""


def family_of(model: PreTrainedModel, families: Mapping[str, type[ModelFamily]]) -> ModelFamily:
    """The family that serves ``model``. Raises ``ValueError`` for a class that none does, and ``TypeError`` for what is
    no model; of a wrapped model the message says what to pass."""
    for family in families.values():
        if type(model).__name__ in family.classes:
            return family(model)
    for name, inside in _INSIDE.items():
        if hasattr(model, name) and not isinstance(model, type):
            raise ValueError(f"{type(model).__name__} wraps a model: pass {inside}, and go on calling the wrapper")
    supported = sorted(name for family in families.values() for name in family.classes)
    if isinstance(model, PreTrainedModel):
        raise ValueError(f"models of class {type(model).__name__} are not supported; supported: {', '.join(supported)}")
    given = f"{model!r}, a {type(model).__name__}"
    if isinstance(model, type):
        given = f"the class {model.__name__}, not an instance of it"
    elif model is None:
        given = "None"
    raise TypeError(f"model is {given}: give a loaded model instance, of one of {', '.join(supported)}")
