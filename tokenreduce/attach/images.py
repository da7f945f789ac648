"""Encoding the pictures of one call and letting a reducer choose among their visual tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.attach import taps
from tokenreduce.attach.selecting import checked
from tokenreduce.models.family import Inputs, ModelFamily
from tokenreduce.reducer import (
    AtDecoder,
    AtInput,
    Geometry,
    Grid,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    layer_index,
)
from tokenreduce.signals import Attention, EncoderAttention, EncoderHidden


@dataclass(frozen=True)
class StepReduction:
    """What one step did to one image.

    index: the tokens that stay, in the image's own numbering; source: for each of the image's tokens the row it went
    into,
    -1 for a dropped one; merged: whether rows are other than the tokens at ``index``.
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
        """How many of the picture's tokens the vision tower computed."""
        at_input = [len(step.index) for step in self.steps if step.site == "input"]
        return at_input[-1] if at_input else len(self.grid)


@dataclass
class ReducedImage:
    """One image on its way to the language model: ``index`` (k,) places among its placeholders, ``features`` (k,
    dim)."""

    grid: Grid
    index: Tensor
    features: Tensor | None = None
    steps: list[StepReduction] = field(default_factory=list)
    carried: Any = None

    def take(self, site: str, selection: Selection, features: Tensor | None) -> None:
        """Apply one step's selection."""
        entering = len(self.index)
        self.index = self.index[selection.index.to(self.index.device)]
        self.features = features
        self.carried = selection.carry
        before = self.steps[-1].source if self.steps else range(len(self.grid))
        source = selection.sources(entering).tolist()
        self.steps.append(
            StepReduction(
                site,
                tuple(self.index.tolist()),
                tuple(-1 if row < 0 else source[row] for row in before),
                selection.features is not None,
            )
        )


def reduce_images(reducer: TokenReducer, family: ModelFamily, inputs: Inputs) -> list[ReducedImage]:
    """Encode every image of the call and run the reducer's steps on it, up to the projector."""
    steps = [step for step in reducer.steps(family.geometry) if not isinstance(step, AtDecoder)]
    images = [ReducedImage(grid, torch.arange(len(grid))) for grid in family.grids(inputs)]
    while steps and isinstance(steps[0], AtInput):
        inputs = _resize(reducer, steps.pop(0), family, inputs, images)
    if all(len(image.index) == 0 for image in images):
        return images
    declared = {signal for step in steps for signal in step.sees}
    attention = {
        signal: attention_module(family, signal) for signal in declared if isinstance(signal, EncoderAttention)
    }
    with taps.capture(attention.values()) as captured:
        features, hidden = family.encode(inputs, any(isinstance(signal, EncoderHidden) for signal in declared))

    for number, image in enumerate(images):

        def signal_value(signal: Hashable, number: int = number) -> Any:
            if signal not in declared:
                raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
            if isinstance(signal, EncoderAttention):
                return _attention(captured[attention[signal]], number, family.geometry)
            assert isinstance(signal, EncoderHidden)
            layer = layer_index(signal.layer, family.geometry.encoder_layers)
            return hidden[layer + 1][number, int(family.geometry.class_token) :]

        image.index = image.index.to(features[number].device)
        image.features = features[number]
        for step in steps:
            _project(reducer, step, image, signal_value, functools.partial(family.fingerprint, inputs, number))
    return images


def _resize(
    reducer: TokenReducer, step: Step, family: ModelFamily, inputs: Inputs, images: Sequence[ReducedImage]
) -> Inputs:
    """Make every picture smaller, or take all of them away."""
    targets = []
    for image in images:
        count = reducer.count(step, Span((image.grid,), len(image.grid), len(image.index)))
        if count is None:
            raise ValueError(f"{type(reducer).__name__}: a step at the input must say how many tokens it leaves")
        targets.append(image.grid.fit(count) if count else None)
    for image, target in zip(images, targets, strict=True):
        index, source = image.grid.cells(target) if target else (torch.arange(0), torch.full((len(image.grid),), -1))
        image.take("input", Selection(index, source=source), None)
    grids = [target for target in targets if target]
    if len(grids) not in (0, len(images)):
        raise ValueError(
            f"{type(reducer).__name__} takes away some pictures of a call and keeps others, which is not supported"
        )
    return {**inputs, **family.resize(inputs, grids)} if grids else inputs


def _project(
    reducer: TokenReducer,
    step: Step,
    image: ReducedImage,
    signals: Callable[[Hashable], Any],
    fingerprint: Callable[[], int],
) -> None:
    """Run one step at the projector on one image."""
    features = image.features
    assert features is not None
    span = Span((image.grid,), len(image.grid), len(image.index))
    tokens = VisualTokens(
        features,
        span,
        reducer.count(step, span),
        index=image.index,
        signals=signals,
        fingerprint=fingerprint,
        carried=image.carried,
    )
    selection = checked(reducer, step, tokens)
    image.take("projector", selection, features[selection.index] if selection.features is None else selection.features)


def attention_module(family: ModelFamily, signal: EncoderAttention) -> Any:
    modules = family.encoder_attention()
    return modules[layer_index(signal.layer, len(modules))]


def _attention(captured: taps.Captured | None, number: int, geometry: Geometry) -> Attention:
    if captured is None:
        raise RuntimeError(
            "the vision encoder did not run through transformers' attention interface, so it cannot be seen"
        )
    mask = captured.mask
    return Attention(
        captured.queries[number],
        captured.keys[number],
        captured.values[number],
        captured.scale,
        visual=slice(int(geometry.class_token), None),
        class_token=0 if geometry.class_token else None,
        mask=None if mask is None else mask[number if len(mask) > 1 else 0, 0],
    )
