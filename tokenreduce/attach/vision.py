"""Encoding the pictures of one call and letting a reducer choose among their visual tokens, up to the projector."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenreduce.attach import taps
from tokenreduce.attach.selecting import checked
from tokenreduce.models.family import Inputs, ModelFamily
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
from tokenreduce.signals import Attention, ClassToken, EncoderAttention, EncoderHidden, TokenSizes

VISION_SIGNALS = (EncoderAttention, EncoderHidden, ClassToken, TokenSizes)
"""The signals that a step before the language model can see."""


@dataclass(frozen=True)
class StepReduction:
    """What one step did to one image.

    index:  the tokens that stay, in the image's own numbering; -1 for a row that stands for none (a class token).
    source: for each of the image's tokens the row it went into, -1 for a dropped one.
    merged: whether rows are other than the tokens at ``index``.
    """

    site: str
    index: tuple[int, ...]
    source: tuple[int, ...]
    merged: bool


@dataclass(frozen=True)
class ImageReduction:
    """What a reducer did to one image."""

    grid: Grid
    steps: tuple[StepReduction, ...]

    @property
    def kept(self) -> Sequence[int]:
        """The tokens that stay after the last step."""
        return self.steps[-1].index if self.steps else range(len(self.grid))

    @property
    def encoded(self) -> int:
        """How many of the picture's tokens went into the vision tower."""
        at_input = [len(step.index) for step in self.steps if step.site == "input"]
        return at_input[-1] if at_input else len(self.grid)


@dataclass
class ReducedImage:
    """One image on its way.

    grid: its layout; encoded: the layout that the vision tower sees, smaller where the picture was made smaller.
    index: ``(k,)`` the tokens that are left; entered: their places among those that entered the tower; places: where
    they stand in what the tower gives now, which merging in it renumbers.
    features: ``(k, dim)`` at the projector; sizes: ``(k,)`` how many tokens were merged into each, None while none was.
    """

    grid: Grid
    encoded: Grid
    index: Tensor
    entered: Tensor
    places: Tensor
    features: Tensor | None = None
    sizes: Tensor | None = None
    steps: list[StepReduction] = field(default_factory=list)
    carried: Any = None

    def take(self, site: str, selection: Selection) -> None:
        """Note what one step selected."""
        entering = len(self.index)
        chosen = selection.index.to(self.index.device)
        self.index = _follow(self.index, chosen)
        self.entered = _follow(self.entered, chosen)
        self.places = _follow(self.places, chosen)
        self.carried, self.sizes = selection.carry, selection.size
        before = self.steps[-1].source if self.steps else range(len(self.grid))
        source = selection.sources(entering).tolist()
        into = tuple(-1 if row < 0 else source[row] for row in before)
        self.steps.append(StepReduction(site, tuple(self.index.tolist()), into, selection.features is not None))

    def placeholders(self) -> Tensor:
        """A placeholder for every row ``(k,)``: its token's own, and the first free ones for rows without a token."""
        homeless = self.index < 0
        if not bool(homeless.any()):
            return self.index
        free = torch.ones(len(self.grid), dtype=torch.bool, device=self.index.device)
        free[self.index[~homeless]] = False
        places = self.index.clone()
        places[homeless] = free.nonzero()[: int(homeless.sum()), 0]
        return places


def _follow(values: Tensor, chosen: Tensor) -> Tensor:
    """``values`` at ``chosen``, and -1 where that is -1."""
    return values[chosen.clamp(min=0)].masked_fill(chosen < 0, -1) if len(chosen) else chosen


@dataclass
class _Encoding:
    """One run of the vision tower: the images in it, and what was captured on the way."""

    images: Sequence[ReducedImage]
    inputs: Inputs
    attention: dict[nn.Module, taps.Captured | None] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    merged: Tensor | None = None
    update: Tensor | None = None


class VisionSite:
    """The steps of a reducer before the language model, on one model."""

    def __init__(self, reducer: TokenReducer, family: ModelFamily) -> None:
        self.reducer = reducer
        self.family = family
        self.steps = [step for step in reducer.steps(family.geometry) if not isinstance(step, AtDecoder)]
        self._current: ContextVar[_Encoding | None] = ContextVar("tokenreduce_encoding", default=None)
        depth = family.geometry.encoder_layers
        signals = [signal for step in self.steps for signal in step.sees]
        modules = family.encoder_attention()
        self._attention = {
            signal: modules[layer_index(signal.layer, depth)]
            for signal in signals
            if isinstance(signal, EncoderAttention)
        }
        self._hidden = {layer_index(signal.layer, depth) for signal in signals if isinstance(signal, EncoderHidden)}
        if any(isinstance(signal, ClassToken) for signal in signals):
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
            layers = self.family.encoder_layers()
            for number, layer in enumerate(layers):
                hooks = []
                if number in self._hidden or number in self._inside:
                    hooks.append(layer.register_forward_hook(self._after_layer(number), prepend=True))
                if self._inside:
                    hooks.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
                if any(step.where == "attention" for step in self._inside.get(number, ())):
                    hooks.append(layer.layer_norm2.register_forward_pre_hook(self._after_attention(number)))
                    hooks.append(layer.mlp.register_forward_hook(self._after_mlp))
                for hook in hooks:
                    stack.callback(hook.remove)
            if any(isinstance(step, AtEncoderOutput) for step in self.steps):
                stack.callback(self.family.projector.register_forward_pre_hook(self._before_projector).remove)
            yield

    def reduce(self, inputs: Inputs) -> list[ReducedImage]:
        """Encode every image of the call and run the reducer's steps on it, up to the projector."""
        images = []
        for grid in self.family.grids(inputs):
            everything = torch.arange(len(grid))
            images.append(ReducedImage(grid, grid, index=everything, entered=everything, places=everything))
        for step in self.steps:
            if isinstance(step, AtInput):
                inputs = self._resize(step, inputs, images)
        if all(len(image.index) == 0 for image in images):
            return images
        # Images may lose different numbers of tokens inside the tower, so they then go through it one by one.
        size = 1 if self._inside else len(images)
        for first in range(0, len(images), size):
            batch = images[first : first + size]
            self._encode(_Encoding(batch, self.family.some(inputs, slice(first, first + size))))
        return images

    def _encode(self, encoding: _Encoding) -> None:
        for image in encoding.images:
            image.index = image.index.to(self.family.model.device)
            image.entered = image.entered.to(self.family.model.device)
            image.places = image.places.to(self.family.model.device)
        token = self._current.set(encoding)
        try:
            with taps.capture(self._attention.values()) as encoding.attention:
                features = self.family.encode(encoding.inputs)
        finally:
            self._current.reset(token)
        for number, image in enumerate(encoding.images):
            image.features = features[number][: len(image.index)]
            for step in self.steps:
                if isinstance(step, AtProjector):
                    image.features = self._select(encoding, number, step, "projector", image.features)

    def _select(self, encoding: _Encoding, number: int, step: Step, site: str, features: Tensor) -> Tensor:
        """Run one step on one image; the features ``(k, dim)`` that it leaves of ``(n, dim)``."""
        image = encoding.images[number]
        span = Span(self.family.geometry, (image.encoded,), len(image.encoded), len(image.index))
        tokens = VisualTokens(
            features,
            span,
            self.reducer.count(step, span),
            index=image.entered,
            signals=self._signals(encoding, number, step),
            fingerprint=lambda: self.family.fingerprint(encoding.inputs, number),
            carried=image.carried,
        )
        selection = checked(self.reducer, step, tokens)
        image.take(site, selection)
        return features[selection.index] if selection.features is None else selection.features

    def _signals(self, encoding: _Encoding, number: int, step: Step) -> Callable[[Hashable], Any]:
        image, class_token = encoding.images[number], int(self.family.geometry.class_token)

        def value(signal: Hashable) -> Any:
            if signal not in step.sees:
                raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
            match signal:
                case EncoderAttention():
                    return self._view(encoding.attention[self._attention[signal]], number, image.places)
                case EncoderHidden(layer=layer):
                    layer = layer_index(layer, self.family.geometry.encoder_layers)
                    return encoding.hidden[layer][number, class_token + image.places]
                case ClassToken():
                    if not class_token:
                        raise ValueError(f"{type(self.family).__name__}'s vision encoder has no class token")
                    return encoding.hidden[self.family.geometry.feature_layer][number, 0]
                case TokenSizes():
                    return (
                        torch.ones(len(image.index), device=image.index.device) if image.sizes is None else image.sizes
                    )
            raise KeyError(f"{signal} does not exist before the language model")

        return value

    def _view(self, captured: taps.Captured | None, number: int, places: Tensor) -> Attention:
        if captured is None:
            raise RuntimeError(
                "the vision encoder did not run through transformers' attention interface, so it cannot be seen"
            )
        mask, class_token = captured.mask, self.family.geometry.class_token
        return Attention(
            captured.queries[number],
            captured.keys[number],
            captured.values[number],
            captured.scale,
            visual=int(class_token) + places,
            class_token=0 if class_token else None,
            mask=None if mask is None else mask[number if len(mask) > 1 else 0, 0],
        )

    def _resize(self, step: AtInput, inputs: Inputs, images: Sequence[ReducedImage]) -> Inputs:
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
            image.entered = image.places = torch.arange(len(index))
        return {**inputs, **self.family.resize(inputs, grids)} if grids else inputs

    # Inside the tower. The class token stays in the sequence and is not shown to the reducer.

    def _before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Proportional attention: a token that holds several others counts as often."""
        encoding = self._current.get()
        if encoding is None or encoding.images[0].sizes is None:
            return None
        sizes = encoding.images[0].sizes.log()
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
                features = self._select(encoding, 0, step, f"encoder layer {number}", hidden[0, class_token:])
                encoding.images[0].places = torch.arange(len(features), device=features.device)
                hidden = torch.cat([hidden[:, :class_token], features[None]], dim=1)
        return hidden

    def _before_projector(self, projector: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        encoding = self._current.get()
        if encoding is None:
            return None
        rows = []
        for number, features in enumerate(args[0]):
            for step in self.steps:
                if isinstance(step, AtEncoderOutput):
                    features = self._select(encoding, number, step, "encoder output", features)
            rows.append(features)
        return (pad_sequence(rows, batch_first=True),)
