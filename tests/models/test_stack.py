"""The stack of decoder layers: what it says about a family's layers is what these are given and do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tokenreduce.models.family import ModelFamily, family_of
from tokenreduce.models.loading import load
from tokenreduce.models.stack import DecoderStack
from tokenreduce.reducer import AtEncoder
from tokenreduce.registry import MODELS
from tokenreduce.testing.checkpoints import ask, picture, recipes

Checkpoint = Callable[[str], Path]
Calls = dict[nn.Module, dict[str, Any]]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in recipes()])
def served(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> tuple[ModelFamily, Any]:
    """A family's model, and two prompts about a picture each, the first of which is padded."""
    model, processor = load(str(checkpoint(request.param)), attention=recipes()[request.param].attention)
    return family_of(model, MODELS.usable()), ask(processor, [[picture(0, 30, 60)], [picture(1, 60, 60)]])


@contextmanager
def called(modules: list[nn.Module]) -> Iterator[Calls]:
    """The arguments that modules are called with, the first under the name ``hidden_states`` where it has none."""
    calls: Calls = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = {**({"hidden_states": args[0]} if args else {}), **kwargs}

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def run(family: ModelFamily, inputs: Any) -> tuple[DecoderStack, Calls, Tensor]:
    """One forward call: what the stack, its layers and their attention were called with, and the logits."""
    stack = family.stack
    attention = [stack.attention(number) for number in range(stack.depth)]
    with torch.no_grad(), called([family.decoder, *stack.layers, *attention]) as calls:
        logits = family.model(**inputs).logits
    return stack, calls, logits


def positions_in(stack: DecoderStack, calls: Calls) -> Tensor:
    """The position ids of a call, in space and time where it has such."""
    given = calls[stack.module].get("position_ids")
    given = calls[stack.layers[0]]["position_ids"] if given is None else given
    return given[-3:] if given.ndim == 3 else given


def test_rotary_embeddings_are_those_that_the_layers_are_given(served: tuple[ModelFamily, Any]) -> None:
    stack, calls, _ = run(*served)
    positions = positions_in(stack, calls)
    for number, layer in enumerate(stack.layers):
        given = calls[layer]
        for mine, own in zip(
            stack.rotary(given["hidden_states"], positions, number), given["position_embeddings"], strict=True
        ):
            assert torch.equal(mine, own)


def test_attention_inputs_are_those_that_a_layer_gives_its_attention(served: tuple[ModelFamily, Any]) -> None:
    stack, calls, _ = run(*served)
    for number, layer in enumerate(stack.layers):
        given = dict(calls[layer])
        own = calls[stack.attention(number)]
        with torch.no_grad():
            inputs = stack.attention_inputs(number, given.pop("hidden_states"), given)
        assert all(value is own.get(name) for name, value in inputs.items() if not isinstance(value, Tensor))
        for name in ("hidden_states", "attention_mask"):
            assert inputs[name] is None or torch.equal(inputs[name], own[name]), name


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_mask_allows_what_it_is_told_to(served: tuple[ModelFamily, Any], kernel: str) -> None:
    """In place of the model's own masks, made of what those allow."""
    family, inputs = served
    if kernel == "sdpa" and family.stack.kernel == "eager":
        pytest.skip("the model cannot do with it")
    family.model.set_attn_implementation(kernel)
    stack, calls, logits = run(family, inputs)
    assert stack.kernel == kernel
    assert {calls[layer]["attention_mask"].dtype for layer in stack.layers} == {
        torch.float32 if kernel == "eager" else torch.bool
    }

    def replaced(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = kwargs["attention_mask"][:, 0]
        mask = stack.mask(own if own.dtype == torch.bool else own == 0, args[0].dtype)
        assert mask.dtype == own.dtype
        return args, {**kwargs, "attention_mask": mask}

    hooks = [layer.register_forward_pre_hook(replaced, with_kwargs=True) for layer in stack.layers]
    try:
        with torch.no_grad():
            again = family.model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    valid = inputs["attention_mask"].bool()
    assert torch.equal(again[valid], logits[valid])


def test_keys_turned_back_are_those_of_earlier_positions(served: tuple[ModelFamily, Any]) -> None:
    stack, calls, _ = run(*served)
    positions = positions_in(stack, calls)
    for number in range(stack.depth):
        assert_turned_back(stack, number, positions, family_head_dim(stack))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=str,
)
def test_keys_are_turned_back_under_every_kind_of_rotary_embedding(rope: dict[str, Any]) -> None:
    config = transformers.PhiConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 1e4, **rope},
    )
    decoder = transformers.PhiModel(config)
    decoder.norm = decoder.final_layernorm
    assert_turned_back(DecoderStack(decoder), 0, torch.arange(80)[None], 16)


def family_head_dim(stack: DecoderStack) -> int:
    config = stack.module.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def assert_turned_back(stack: DecoderStack, layer: int, positions: Tensor, head_dim: int) -> None:
    """Turned back by 5, or by 0, 1, 2, ... positions, keys are those that the rotary embedding itself gives there."""
    length = positions.shape[-1]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, length, head_dim, generator=generator)

    def rotated(places: Tensor) -> Tensor:
        cos, sin = (each[:1] for each in stack.rotary(states, places, layer))
        width = cos.shape[-1]
        turned, _ = apply_rotary_pos_emb(states[..., :width], states[..., :width], cos, sin)
        return torch.cat([turned, states[..., width:]], dim=-1)[0]

    later = rotated(positions + 100)
    for by in (5, torch.arange(length)):
        earlier = rotated(positions + 100 - by)
        assert not torch.allclose(earlier, later, atol=1e-2)
        torch.testing.assert_close(stack.rotated_back(later, by, layer), earlier, rtol=1e-4, atol=1e-4)


def test_windows_are_those_of_the_layers(served: tuple[ModelFamily, Any]) -> None:
    stack, calls, _ = run(*served)
    for number, layer in enumerate(stack.layers):
        window = stack.sliding_window(number)
        assert window == getattr(stack.attention(number), "sliding_window", None)
        length = calls[layer]["hidden_states"].shape[1]
        assert stack.slides(number, length) == (window is not None and length > window)


def test_what_is_added_behind_the_first_layers_can_be_added_by_hand(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("qwen3_vl")))
    inputs = ask(processor, [[picture(0, 30, 60)], [picture(1, 60, 60)]])
    family = family_of(model, MODELS.usable())
    stack, calls, logits = run(family, inputs)
    levels, rest = stack.take_deepstack(calls[stack.module])
    assert len(levels) == 2

    def add(level: Tensor) -> Callable[..., Tensor]:
        return lambda layer, args, output: output + level

    hooks = [layer.register_forward_hook(add(level)) for layer, level in zip(stack.layers, levels, strict=False)]
    try:
        with torch.no_grad():
            output = stack.module(**rest).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(model.lm_head(output), logits)
    assert stack.take_deepstack(rest) == ([], rest)


def test_halves_of_a_layer_are_its_second_half(served: tuple[ModelFamily, Any]) -> None:
    family, inputs = served
    if not family.hosts(AtEncoder):
        assert not family.shortens
        return
    layer: Any = family.encoder_layers()[1]
    norm, mlp = family.halves(layer)
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), called([norm]) as calls:
        family.encode(inputs)
        states = next(iter(calls[norm].values()))
        torch.testing.assert_close(states + mlp(norm(states)), outputs[0])
    hook.remove()
    assert family.shortens
