"""A picture and a prompt made up of random states, to run any reducer's steps on without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.passage import Group, Journey
from tokenreduce.reducer import (
    Geometry,
    Grid,
    Layer,
    Selection,
    Step,
    Tile,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.signals import Attention, Clip, Scene, View
from tokenreduce.testing.wrapping import Wrapped

LLAVA = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
"""LLaVA-1.5-7B's."""


class MadeUp(View):
    """What a model would show of one picture, in random states of which every layer has the same.

    grid:     the layout of the picture's tokens.
    dim:      the width of all states; the heads of attention share it.
    text:     how many tokens of text stand behind the picture.
    geometry: the model's.
    """

    def __init__(
        self, grid: Grid, *, dim: int = 1024, heads: int = 16, text: int = 64, geometry: Geometry = LLAVA, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        sequence = 1 + len(grid) + text
        self._geometry, self._text = geometry, text
        self._projections = torch.randn(3, heads, sequence, dim // heads, generator=generator)
        self._states = torch.randn(sequence, dim, generator=generator)
        self._clip = torch.randn(len(grid) + text, dim // 2, generator=generator)
        pixels = torch.rand(3, 8 * grid.height, 8 * grid.width, generator=generator)
        self._scene = Scene(None, {}, (Tile(grid),), (pixels,), "what is in the picture ?", None)
        self._current, self._entered = len(grid), self._states[1 : 1 + len(grid)]

    @property
    def scene(self) -> Scene:
        return self._scene

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    def encoder_attention(self, layer: Layer) -> Attention:
        first = int(self._geometry.class_token)
        return self._attention(first, first + self._current, class_token=0 if first else None)

    def encoder_hidden(self, layer: Layer) -> Tensor:
        return self._states[1 : 1 + self._current]

    def class_token(self) -> Tensor:
        return self._states[0]

    def token_sizes(self) -> Tensor:
        return torch.ones(self._current)

    def decoder_attention(self, layer: Layer) -> Attention:
        end = 1 + self._current
        return self._attention(1, end + self._text, causal=True, text=torch.arange(end, end + self._text))

    def look_ahead(self, rotated: bool) -> Attention:
        return self.decoder_attention(0)

    def decoder_hidden(self, normed: bool) -> Tensor:
        return self._states[: 1 + self._current + self._text]

    def entered(self) -> tuple[Tensor, Tensor]:
        return self._entered, self._states[-self._text :]

    def question_embeddings(self, parts: Callable[[str], Sequence[str]] = lambda question: (question,)) -> Tensor:
        return self._states[-self._text :]

    def paired_text(self) -> Tensor:
        return self._states[-self._text :]

    def clip(self, checkpoint: str, truncate: bool = False) -> Clip:
        words = self._clip[-self._text :]
        return Clip(self._clip[: self._current], words[:1], words, words[None])

    def _attention(
        self, first: int, length: int, causal: bool = False, class_token: int | None = None, text: Tensor | None = None
    ) -> Attention:
        queries, keys, values = self._projections[:, :, :length]
        visual = torch.arange(first, first + self._current)
        scale = keys.shape[-1] ** -0.5
        return Attention(queries, keys, values, scale, visual, class_token=class_token, causal=causal, text=text)

    def run(
        self, reducer: TokenReducer, within: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> Iterator[Selection]:
        """What a reducer selects, step by step, in those that see tokens. Every call of ``select`` is made in a context
        of ``within``, which may time it or watch it.

        >>> from tokenreduce import create
        >>> [len(each.index) for each in MadeUp(Grid(6, 6), dim=64).run(create("pyramiddrop"))]
        [18, 9, 4]
        """
        journey, inside = Journey(self._scene.tiles), False
        features = self._entered = self._states[1 : 1 + len(self._scene.tiles[0].grid)]
        watched = _Within(reducer, within)
        for step in reducer.steps(self._geometry):
            if step.resizes:
                continue
            group = Group(journey, journey.tracks)
            if not inside and step.decoder_layer(self._geometry) is not None:
                journey.enter(group.order)
                self._entered, inside = features, True
                group = Group(journey, journey.tracks)
            self._current = len(group)
            taken = group.select(watched, step, features, self._geometry, lambda signal: [signal.value(self)])
            features = taken.rows(features)
            yield taken.selection


@dataclass(frozen=True)
class _Within(Wrapped):
    """Another reducer, whose selections are made in a context."""

    within: Callable[[], AbstractContextManager[object]]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        with self.within():
            return super().select(step, tokens)
