"""Encoding the pictures of one call and letting a reducer choose among their visual tokens, up to the projector."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenreduce.attach import taps
from tokenreduce.attach.clip import clip_space
from tokenreduce.attach.reductions import ImageReduction, StepReduction
from tokenreduce.attach.selecting import checked
from tokenreduce.models.family import Inputs, Modality, ModelFamily, Picture, Tile
from tokenreduce.reducer import (
    AtDecoder,
    AtEncoder,
    AtEncoderOutput,
    AtInput,
    AtProjector,
    Grid,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    layer_index,
)
from tokenreduce.signals import Attention, ClassToken, EncoderAttention, EncoderHidden, QuestionLikeness, TokenSizes
from tokenreduce.stopwatch import part

VISION_SIGNALS = (EncoderAttention, EncoderHidden, ClassToken, TokenSizes, QuestionLikeness)
"""The signals that a step before the language model can see."""


@dataclass(eq=False)
class ReducedTile:
    """One tile on its way.

    tile: what it was; encoded: the layout that the vision tower sees, smaller where the picture was made smaller.
    number: which of its picture's tiles it is.
    index: ``(k,)`` the tokens that are left; entered: their places among those that entered the tower.
    patches: ``(k,)`` or ``(k, group)`` where theirs stand in what the tower gives now, which merging in it renumbers.
    features: ``(k, dim)`` at the projector, and behind them what deeper layers add; sizes: ``(k,)`` how many tokens
    were merged into each, None while none was.
    """

    tile: Tile
    number: int
    encoded: Grid
    index: Tensor
    entered: Tensor
    patches: Tensor
    features: tuple[Tensor, ...] = ()
    sizes: Tensor | None = None
    steps: list[StepReduction] = field(default_factory=list)
    carried: Any = None

    @property
    def grid(self) -> Grid:
        return self.tile.grid

    @property
    def reduction(self) -> ImageReduction:
        at_input = [step for step in self.steps if step.site == "input"]
        encoded = len(at_input[-1].index) if at_input else self.tile.encoded
        return ImageReduction(self.grid, tuple(self.steps), encoded, "crop" if self.tile.part else "whole")

    def take(self, site: str, selection: Selection) -> None:
        """Note what one step selected."""
        entering = len(self.index)
        chosen = selection.index.to(self.index.device)
        self.index = _follow(self.index, chosen)
        self.entered = _follow(self.entered, chosen)
        self.patches = _follow(self.patches, chosen)
        self.carried, self.sizes = selection.carry, selection.size
        before = self.steps[-1].source if self.steps else range(len(self.grid))
        source = selection.sources(entering).tolist()
        into = tuple(-1 if row < 0 else source[row] for row in before)
        self.steps.append(StepReduction(site, tuple(self.index.tolist()), into, selection.features is not None))

    def places(self) -> Tensor:
        """A token's place for every row ``(k,)``: its own, and the first free ones for rows without a token."""
        homeless = self.index < 0
        if not bool(homeless.any()):
            return self.index
        free = torch.ones(len(self.grid), dtype=torch.bool, device=self.index.device)
        free[self.index[~homeless]] = False
        places = self.index.clone()
        places[homeless] = free.nonzero()[: int(homeless.sum()), 0]
        return places


@dataclass(eq=False)
class ReducedPicture:
    """One image or video on its way: its tiles, the features ``(placeholders, dim)`` of its special tokens, and what is
    asked about it."""

    picture: Picture
    tiles: list[ReducedTile]
    packed: tuple[Tensor, ...] = ()
    question: str = ""

    @classmethod
    def whole(cls, picture: Picture) -> ReducedPicture:
        tiles = []
        for number, tile in enumerate(picture.tiles):
            everything = torch.arange(len(tile.grid))
            tiles.append(ReducedTile(tile, number, tile.grid, everything, everything, tile.patches))
        return cls(picture, tiles)

    def left(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What is left of it in the prompt.

        The places among its placeholders ``(k,)``; the tile and the row of that tile that stand there ``(k, 2)``, -1
        for special tokens; and their features, none where the picture was not encoded.
        """
        homes = self._homes()
        places = torch.cat([home[tile.places().cpu()] for home, tile in zip(homes, self.tiles, strict=True)])
        rows = [torch.arange(len(tile.index)) for tile in self.tiles]
        owners = torch.cat([torch.full_like(row, tile.number) for row, tile in zip(rows, self.tiles, strict=True)])
        entries = torch.stack([owners, torch.cat(rows)], dim=1)
        levels = [torch.cat(level) for level in zip(*(tile.features for tile in self.tiles), strict=True)]
        special = (self.picture.tokens < 0) & torch.isin(self.picture.lines, self.picture.lines[places])
        if bool(special.any()):
            extra = special.nonzero()[:, 0]
            places = torch.cat([places, extra])
            entries = torch.cat([entries, entries.new_full((len(extra), 2), -1)])
            levels = [torch.cat([level, whole[extra]]) for level, whole in zip(levels, self.packed, strict=True)]
        if len(self.tiles) > 1 or bool(special.any()):  # a single tile's own order is the method's affair
            order = places.argsort()
            places, entries, levels = places[order], entries[order], [level[order] for level in levels]
        return places, entries, tuple(levels)

    def unpack(self, packed: tuple[Tensor, ...], shortened: bool) -> None:
        """Give every tile the features of its tokens, out of what stands at the placeholders ``(placeholders, dim)``;
        ``shortened`` where that holds the one tile's remaining rows alone."""
        self.packed = packed
        for home, tile in zip(self._homes(), self.tiles, strict=True):
            places = torch.arange(len(tile.index)) if shortened else home[tile.places().cpu()]
            tile.features = tuple(level[places.to(level.device)] for level in packed)

    def _homes(self) -> list[Tensor]:
        """For every tile the place of each of its tokens among the placeholders: ``(tokens,)``."""
        tokens = self.picture.tokens
        homes = torch.empty(int((tokens >= 0).sum()), dtype=torch.long)
        homes[tokens[tokens >= 0]] = (tokens >= 0).nonzero()[:, 0]
        return list(homes.split([len(tile.grid) for tile in self.tiles]))


def _follow(values: Tensor, chosen: Tensor) -> Tensor:
    """``values`` at ``chosen``, and -1 where that is -1."""
    if not len(chosen):
        return values[:0]
    return values[chosen.clamp(min=0)].masked_fill(chosen.reshape(-1, *[1] * (values.ndim - 1)) < 0, -1)


@dataclass
class _Encoding:
    """One run of the vision tower: the pictures in it, and what was captured on the way."""

    pictures: Sequence[ReducedPicture]
    inputs: Inputs
    modality: Modality
    attention: taps.Captures = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    questions: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    merged: Tensor | None = None
    update: Tensor | None = None

    @property
    def tiles(self) -> list[ReducedTile]:
        return [tile for picture in self.pictures for tile in picture.tiles]

    @property
    def first(self) -> int:
        """The first encoder sequence of the call that is in this run."""
        return self.tiles[0].tile.sequence


class VisionSite:
    """The steps of a reducer before the language model, on one model."""

    def __init__(self, reducer: TokenReducer, family: ModelFamily) -> None:
        self.reducer = reducer
        self.family = family
        self.steps = [step for step in reducer.steps(family.geometry) if not isinstance(step, AtDecoder)]
        self._current: ContextVar[_Encoding | None] = ContextVar("tokenreduce_encoding", default=None)
        depth = family.geometry.encoder_layers
        signals = [signal for step in self.steps for signal in step.sees]
        self._attention = {
            (modality, signal): family.encoder_attention(modality)[layer_index(signal.layer, depth)]
            for modality in family.placeholders
            for signal in signals
            if isinstance(signal, EncoderAttention)
        }
        self._hidden = {layer_index(signal.layer, depth) for signal in signals if isinstance(signal, EncoderHidden)}
        self.asks = any(isinstance(signal, QuestionLikeness) for signal in signals)
        if self.asks or any(isinstance(signal, ClassToken) for signal in signals):
            self._hidden.add(family.geometry.feature_layer)
        self._inside: dict[int, list[AtEncoder]] = {}
        for step in self.steps:
            if isinstance(step, AtEncoder):
                self._inside.setdefault(layer_index(step.layer, depth), []).append(step)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in the vision tower while this context lasts."""
        with ExitStack() as stack:
            stack.enter_context(taps.installed(self._attention.values()))
            towers = {id(layers): layers for layers in map(self.family.encoder_layers, self.family.placeholders)}
            for layers in towers.values():
                self._install(layers, stack)
            if any(isinstance(step, AtEncoderOutput) for step in self.steps):
                stack.callback(self.family.projector.register_forward_pre_hook(self._before_projector).remove)
            yield

    def _install(self, layers: Sequence[Any], stack: ExitStack) -> None:
        for number, layer in enumerate(layers):
            hooks = []
            if number in self._hidden or number in self._inside:
                hooks.append(layer.register_forward_hook(self._after_layer(number), prepend=True))
            if self._inside:
                hooks.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
            if any(step.where == "attention" for step in self._inside.get(number, ())):
                norm, mlp = self.family.halves(layer)
                hooks.append(norm.register_forward_pre_hook(self._after_attention(number)))
                hooks.append(mlp.register_forward_hook(self._after_mlp))
            for hook in hooks:
                stack.callback(hook.remove)

    def reduce(self, inputs: Inputs, questions: Sequence[str] = ()) -> list[ReducedPicture]:
        """Encode every picture of the call and run the reducer's steps on it, up to the projector.

        ``questions`` holds what is asked about every picture, if the reducer ``asks``.
        """
        pictures = [ReducedPicture.whole(picture) for picture in self.family.pictures(inputs)]
        for picture, question in zip(pictures, questions, strict=False):
            picture.question = question
        for step in self.steps:
            if isinstance(step, AtInput):
                inputs = self._resize(step, inputs, [tile for picture in pictures for tile in picture.tiles])
        if all(len(tile.index) == 0 for picture in pictures for tile in picture.tiles):
            return pictures
        for modality in self.family.placeholders:
            some = [picture for picture in pictures if picture.picture.modality == modality]
            # Images may lose different numbers of tokens inside the tower, so they then go through it one by one.
            size = 1 if self._inside else max(1, len(some))
            for first in range(0, len(some), size):
                part = self.family.some(inputs, slice(first, first + size), modality) if size < len(some) else inputs
                self._encode(_Encoding(some[first : first + size], part, modality))
        return pictures

    def _encode(self, encoding: _Encoding) -> None:
        device = self.family.model.device
        for tile in encoding.tiles:
            tile.index, tile.entered = tile.index.to(device), tile.entered.to(device)
            tile.patches = tile.patches.to(device)
        token = self._current.set(encoding)
        try:
            with taps.capture(self._attention.values()) as encoding.attention:
                encoded = self.family.encode(encoding.inputs, encoding.modality)
        finally:
            self._current.reset(token)
        shortened = self.family.shortens
        for picture, features in zip(encoding.pictures, encoded, strict=True):
            picture.unpack(features, shortened)
        for tile in encoding.tiles:
            for step in self.steps:
                if isinstance(step, AtProjector) and len(tile.index):
                    self._select_projected(encoding, tile, step)

    def _select_projected(self, encoding: _Encoding, tile: ReducedTile, step: AtProjector) -> None:
        """Run a step behind the projector; what deeper layers add follows the tokens, merged ones by their mean."""
        features, *deeper = tile.features
        before = len(tile.index)
        selection, features = self._select(encoding, tile, step, "projector", features)
        if selection.features is None:
            deeper = [level[selection.index] for level in deeper]
        elif deeper:
            source = selection.sources(before).to(features.device)
            members = torch.nn.functional.one_hot(source[source >= 0], len(features)).T.to(features.dtype)
            means = members / members.sum(-1, keepdim=True).clamp(min=1)
            deeper = [means @ level[source >= 0] for level in deeper]
        tile.features = (features, *deeper)

    @part("selection")
    def _select(
        self, encoding: _Encoding, tile: ReducedTile, step: Step, site: str, features: Tensor
    ) -> tuple[Selection, Tensor]:
        """Run one step on one tile; the features ``(k, dim)`` that it leaves of ``(n, dim)``."""
        span = Span(self.family.geometry, (tile.encoded,), len(tile.encoded), len(tile.index))
        picture = next(picture.picture for picture in encoding.pictures if tile in picture.tiles)
        tokens = VisualTokens(
            features,
            span,
            self.reducer.count(step, span),
            index=tile.entered,
            signals=self._signals(encoding, tile, step),
            fingerprint=lambda: _checksum(picture.pixels) + tile.number,
            carried=tile.carried,
        )
        selection = checked(self.reducer, step, tokens)
        tile.take(site, selection)
        return selection, features[selection.index] if selection.features is None else selection.features

    def _signals(self, encoding: _Encoding, tile: ReducedTile, step: Step) -> Callable[[Hashable], Any]:
        class_token = int(self.family.geometry.class_token)

        def value(signal: Hashable) -> Any:
            if signal not in step.sees:
                raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
            match signal:
                case EncoderAttention():
                    return self._view(encoding, encoding.attention[self._attention[encoding.modality, signal]], tile)
                case EncoderHidden(layer=layer):
                    return self._states(encoding, layer_index(layer, self.family.geometry.encoder_layers), tile)
                case ClassToken():
                    if not class_token:
                        raise ValueError(f"{type(self.family).__name__}'s vision encoder has no class token")
                    return self._sequence(encoding, encoding.hidden[self.family.geometry.feature_layer], tile)[0]
                case QuestionLikeness(clip=checkpoint):
                    states = self._states(encoding, self.family.geometry.feature_layer, tile)
                    space = clip_space(checkpoint, states.device)
                    text = next(picture.question for picture in encoding.pictures if tile in picture.tiles)
                    if (checkpoint, text) not in encoding.questions:
                        encoding.questions[checkpoint, text] = space.question(text)
                    return space.patches(states) @ encoding.questions[checkpoint, text].T
                case TokenSizes():
                    return torch.ones(len(tile.index), device=tile.index.device) if tile.sizes is None else tile.sizes
            raise KeyError(f"{signal} does not exist before the language model")

        return value

    def _states(self, encoding: _Encoding, layer: int, tile: ReducedTile) -> Tensor:
        """The states of one tile's tokens after an encoder layer: ``(tokens, dim)``."""
        class_token = int(self.family.geometry.class_token)
        states = self._sequence(encoding, encoding.hidden[layer], tile)[class_token + tile.patches]
        return states.mean(1) if states.ndim == 3 else states

    @staticmethod
    def _sequence(encoding: _Encoding, states: Tensor, tile: ReducedTile) -> Tensor:
        """One tile's own stretch of an encoder layer's states: ``(tokens, dim)``."""
        packed = states if states.ndim == 2 else states[tile.tile.sequence - encoding.first]
        return packed if tile.tile.extent is None else packed[tile.tile.extent]

    def _view(self, encoding: _Encoding, calls: Sequence[taps.Captured], tile: ReducedTile) -> Attention:
        if not calls:
            raise RuntimeError(
                "the vision encoder did not run through transformers' attention interface, so it cannot be seen"
            )
        row, extent = tile.tile.sequence - encoding.first, tile.tile.extent
        if extent is None:
            (call,) = calls
            queries, keys, values = (each[row] for each in (call.queries, call.keys, call.values))
        else:  # a packed sequence, which most kernels take in stretches
            call, row = calls[0], 0
            queries, keys, values = (
                torch.cat([getattr(each, name)[0] for each in calls], dim=1)[:, extent]
                for name in ("queries", "keys", "values")
            )
        class_token = self.family.geometry.class_token
        return Attention(
            queries,
            keys,
            values,
            call.scale,
            visual=int(class_token) + tile.patches,
            class_token=0 if class_token else None,
            mask=None if call.mask is None else call.mask[row if len(call.mask) > 1 else 0, 0],
            softcap=call.softcap,
        )

    def _resize(self, step: AtInput, inputs: Inputs, images: Sequence[ReducedTile]) -> Inputs:
        """Make every picture smaller, or take all of them away."""
        name = type(self.reducer).__name__
        targets: list[Grid | None] = []
        for image in images:
            grid = image.encoded
            count = self.reducer.count(step, Span(self.family.geometry, (grid,), len(grid), len(grid)))
            if count is None:
                raise ValueError(f"{name}: a step at the input must say how many tokens it leaves")
            targets.append(grid.fit(count) if count else None)
        grids = [target for target in targets if target is not None]
        if len(grids) not in (0, len(images)):
            raise ValueError(f"{name} takes away some pictures of a call and keeps others, which is not supported")
        for image, target in zip(images, targets, strict=True):
            nothing = torch.arange(0), torch.full((len(image.encoded),), -1)
            index, source = nothing if target is None else image.encoded.cells(target)
            image.take("input", Selection(index, source=source))
            image.encoded = target or image.encoded
            image.entered = image.patches = torch.arange(len(index))
        return {**inputs, **self.family.resize(inputs, grids)} if grids else inputs

    # Inside the tower. The class token stays in the sequence and is not shown to the reducer.

    def _before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Proportional attention: a token that holds several others counts as often."""
        encoding = self._current.get()
        if encoding is None or encoding.tiles[0].sizes is None:
            return None
        sizes = encoding.tiles[0].sizes.log()
        bias = torch.cat([sizes.new_zeros(int(self.family.geometry.class_token)), sizes])
        hidden = args[0] if args else kwargs["hidden_states"]
        bias = bias.to(hidden.dtype).expand(1, 1, hidden.shape[1], hidden.shape[1])
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _after_attention(self, number: int) -> Callable[..., Any]:
        def hook(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            encoding = self._current.get()
            if encoding is None:
                return None
            encoding.merged = self._inside_step(encoding, number, "attention", args[0])
            return (encoding.merged,)

        return hook

    def _after_mlp(self, mlp: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        """The layer adds its own, longer residual to this; :meth:`_after_layer` puts the right sum in its place."""
        encoding = self._current.get()
        if encoding is None:
            return None
        encoding.update = output
        return output[:, :1] * 0

    def _after_layer(self, number: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            encoding = self._current.get()
            if encoding is None:
                return None
            if encoding.merged is not None and encoding.update is not None:
                output = encoding.merged + encoding.update
                encoding.merged = encoding.update = None
            output = self._inside_step(encoding, number, "block", output)
            if number in self._hidden:
                encoding.hidden[number] = output
            return output

        return hook

    def _inside_step(self, encoding: _Encoding, number: int, where: str, hidden: Tensor) -> Tensor:
        class_token = int(self.family.geometry.class_token)
        for step in self._inside.get(number, ()):
            if step.where == where:
                tile = encoding.tiles[0]
                _, features = self._select(encoding, tile, step, f"encoder layer {number}", hidden[0, class_token:])
                tile.patches = torch.arange(len(features), device=features.device)
                hidden = torch.cat([hidden[:, :class_token], features[None]], dim=1)
        return hidden

    def _before_projector(self, projector: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        encoding = self._current.get()
        if encoding is None:
            return None
        steps = [step for step in self.steps if isinstance(step, AtEncoderOutput)]
        sequences = list(args[0])
        shortened = self.family.shortens
        for tile in encoding.tiles:
            if not len(tile.index):
                continue
            number = tile.tile.sequence - encoding.first
            # A projector that takes the class token too has it before the patches.
            patches = len(sequences[number]) - tile.tile.encoded + tile.patches
            features = sequences[number] if shortened else sequences[number][patches]
            for step in steps:
                _, features = self._select(encoding, tile, step, "encoder output", features)
            if shortened:
                sequences[number] = features
            else:  # the model packs whole tiles: rows stand where their tokens did, and nobody reads the others
                sequences[number] = sequences[number].clone()
                sequences[number][patches[tile.places()]] = features
        padded = pad_sequence(sequences, batch_first=True)
        if not args[0].is_contiguous():  # behind a class token: laid out like it, or a linear layer rounds otherwise
            padded = torch.cat([padded[:, :1], padded], dim=1)[:, 1:]
        return (padded,)


def _checksum(pixels: Tensor) -> int:
    """The same for the same pixels in every batch."""
    return zlib.crc32(pixels.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
