"""Where a family says that the patches of a visual token are, they are: features and attention prove it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenreduce import reduce_tokens
from tokenreduce.models.family import EncodedTile, ModelFamily, family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import AtProjector, Geometry, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.registry import MODELS
from tokenreduce.signals import EncoderAttention, EncoderHidden
from tokenreduce.testing.checkpoints import ask, picture, recipes, video

Checkpoint = Callable[[str], Path]
FAMILIES = [
    pytest.param(name, modality, marks=pytest.mark.xdist_group(name))
    for name, recipe in recipes().items()
    for modality in ("image", "video")
    if modality == "image" or recipe.frames
    if name != "paligemma2"  # its vision side is PaliGemma's
]
LAYER = 1


@dataclass(frozen=True)
class Watch(TokenReducer):
    """Writes down what it sees of every tile."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=1.0, sees=(EncoderAttention(LAYER), EncoderHidden(LAYER)))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        self.seen.append((tokens[EncoderAttention(LAYER)].mean(), tokens[EncoderHidden(LAYER)]))
        return tokens.everything()


def question(processor: Any, modality: str) -> dict[str, Tensor]:
    """Two pictures or videos of other shapes in two prompts."""
    if modality == "image":
        return ask(processor, [[picture(0, 30, 90)], [picture(1, 60, 60)]])
    return ask(processor, [[], []], [[video(0, 4, 30, 60)], [video(1, 4, 60, 40)]])


def served(model: Any, modality: str) -> tuple[ModelFamily, Any]:
    """The model's family, and the modality that its own calls go by: to some a video's frames are images."""
    family = family_of(model, MODELS.usable())
    return family, modality if modality in family.placeholders else "image"


@pytest.mark.parametrize(("name", "modality"), FAMILIES)
def test_a_token_is_made_of_its_patches(name: str, modality: str, checkpoint: Checkpoint) -> None:
    """What flows back from a visual token's feature to the layer that the projector reads reaches its patches alone."""
    model, processor = load(str(checkpoint(name)))
    inputs = question(processor, modality)
    family, kind = served(model, modality)
    states: list[Tensor] = []

    def cut(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        states.append(output.detach().requires_grad_())
        return states[-1]

    hook = family.encoder_layers(kind)[family.geometry.feature_layer].register_forward_hook(cut, prepend=True)
    try:
        encoded = family.encode(inputs, kind)
    finally:
        hook.remove()
    (state,) = states
    pictures = family.pictures(inputs)
    shrunk = 0
    for (features, *_), shown in zip(encoded, pictures, strict=True):
        owners = [(tile, place) for tile in shown.tiles for place in range(len(tile.grid))]
        assert len(features) == len(shown.tokens)
        for feature, token in zip(features, shown.tokens.tolist(), strict=True):
            if token < 0:
                continue
            tile, place = owners[token]
            (flow,) = torch.autograd.grad(feature.square().sum(), state, retain_graph=True)
            reach = sequence(family, tile, flow).abs().sum(-1)
            patches = tile.patches[place].reshape(-1) + int(family.geometry.class_token)
            others = float(reach.sum() - reach[patches].sum()) + float(flow.abs().sum() - reach.sum())
            if others > 1e-4 * float(reach.sum()):
                assert name == "llava_onevision"  # it blends the patches about a token's centre, most of the nearest
                assert reach[patches].min() > reach.max() / 2
                shrunk += 1
    assert shrunk or (name, modality) != ("llava_onevision", "image")


@pytest.mark.parametrize(("name", "modality"), FAMILIES)
def test_signals_are_those_of_its_patches(name: str, modality: str, checkpoint: Checkpoint) -> None:
    """Against the weights that the kernel which makes them all computes, and against states of that run."""
    model, processor = load(str(checkpoint(name)))
    inputs = question(processor, modality)
    watch = Watch()
    with reduce_tokens(model, watch), torch.no_grad():
        model(**inputs)
    slow, _ = load(str(checkpoint(name)), attention="eager")
    family, kind = served(slow, modality)
    with spied(family, kind) as (weights, states), torch.no_grad():
        family.encode(inputs, kind)
    tiles = [tile for shown in family.pictures(inputs) for tile in shown.tiles]
    assert len(watch.seen) == len(tiles)
    before = int(family.geometry.class_token)
    stretches = [tile.extent for tile in tiles]
    for number, (tile, (mean, hidden)) in enumerate(zip(tiles, watch.seen, strict=True)):
        if stretches[0] is None:
            (whole,) = weights
            own = whole[tile.sequence]
        else:
            own = weights[number][0]  # a packed sequence is attended to stretch by stretch
        patches = before + tile.patches.reshape(len(tile.grid), -1)
        expected = own.mean(0)[patches[:, :, None, None], patches[None, None]].mean((1, 3))
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-6)
        state = sequence(family, tile, states[0])[patches].mean(1)
        torch.testing.assert_close(hidden, state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_token_of_a_packed_sequence_is_a_square_of_pixels(name: str, checkpoint: Checkpoint) -> None:
    """With attention silenced: four patches in the order of the processor, which go by squares in raster order."""
    model, processor = load(str(checkpoint(name)))
    family, _ = served(model, "image")
    for modality in ("image", "video"):
        inputs = question(processor, modality)
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        inputs[pixels].requires_grad_()
        attention: Any = [layer.attn for layer in family.encoder_layers(modality)]
        hooks = [each.register_forward_hook(lambda module, args, output: 0 * output) for each in attention]
        try:
            features = torch.cat([levels[0] for levels in family.encode(inputs, modality)])
        finally:
            for hook in hooks:
                hook.remove()
        for place, feature in enumerate(features):
            (flow,) = torch.autograd.grad(feature.square().sum(), inputs[pixels], retain_graph=True)
            assert flow.abs().sum(-1).nonzero()[:, 0].tolist() == list(range(4 * place, 4 * place + 4))


def sequence(family: ModelFamily, tile: EncodedTile, states: Tensor) -> Tensor:
    """A tile's own stretch of what a layer of the tower gives: ``(patches, dim)``."""
    own = states if states.ndim == 2 else states[tile.sequence]
    return own if tile.extent is None else own[tile.extent]


@contextmanager
def spied(family: ModelFamily, modality: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What the softmax of the watched attention gives, and the watched layer's states."""
    weights: list[Tensor] = []
    states: list[Tensor] = []
    inside: list[bool] = []
    softmax = nn.functional.softmax

    def spy(scores: Tensor, *args: Any, **options: Any) -> Tensor:
        result = softmax(scores, *args, **options)
        if inside:
            weights.append(result)
        return result

    attention = family.encoder_attention(modality)[family.attention_layer(LAYER)]
    layer = family.encoder_layers(modality)[LAYER]
    hooks = [
        attention.register_forward_pre_hook(lambda *_: inside.append(True)),
        attention.register_forward_hook(lambda *_: inside.clear()),
        layer.register_forward_hook(lambda module, args, output: states.append(output)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", spy)
        try:
            yield weights, states
        finally:
            for hook in hooks:
                hook.remove()
