"""Watching attention shows the layer's own tensors, changes nothing, and leaves nothing behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration as Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenreduce import create, reduce_tokens
from tokenreduce.attach import taps
from tokenreduce.models.llava import Llava
from tokenreduce.signals import Attention
from tokenreduce.testing import prompts, tiny_llava


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [0, -2, -1])
def test_the_tap_sees_what_eager_attention_returns(tower: Any, layer: int) -> None:
    model, eager = tiny_llava(tower=tower), tiny_llava(tower=tower, attention="eager")
    pixels = prompts(model, [2])["pixel_values"]
    module = Llava(model).encoder_attention()[layer]
    with torch.no_grad():
        plain = model.model.vision_tower(pixels).last_hidden_state
        with taps.installed([module]), taps.capture([module]) as captured:
            watched = model.model.vision_tower(pixels).last_hidden_state
        full = eager.model.vision_tower(pixels, output_attentions=True).attentions[layer]
    assert torch.equal(plain, watched)
    (seen,) = captured[module]
    for image in range(2):
        view = Attention(seen.queries[image], seen.keys[image], seen.values[image], seen.scale, slice(None))
        torch.testing.assert_close(view.rows(slice(None)), full[image], rtol=1e-4, atol=1e-6)
        # FoPru's significance, both candidates, from one head-mean map
        for axis in (0, 1):
            torch.testing.assert_close(view.mean().mean(axis), full[image].mean(0).mean(axis), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["fopru_rank", "fopru_row"])
def test_fopru_keeps_the_same_tokens_under_sdpa_and_eager(name: str) -> None:
    samples = []
    for attention in ("sdpa", "eager"):
        model = tiny_llava(attention=attention)
        with reduce_tokens(model, name) as attachment, torch.no_grad():
            model(**prompts(model, [1, 2]))
        samples.append(attachment.samples)
    assert samples[0] == samples[1]


def test_contexts_may_end_in_any_order(llava: Model) -> None:
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    modules = Llava(llava).encoder_attention()
    first, second = taps.installed(modules[:1]), taps.installed(modules[1:])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with taps.capture(modules) as captured, torch.no_grad():
        llava.model.vision_tower(prompts(llava)["pixel_values"])
    assert all(captured.values())
    second.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is kernel


def test_a_kernel_that_somebody_replaced_stays_replaced(llava: Model) -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        with taps.installed(Llava(llava).encoder_attention()):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not theirs
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_the_kernel_comes_back_after_an_error(llava: Model) -> None:
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError), taps.installed(Llava(llava).encoder_attention()):
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is kernel


def test_threads_see_their_own_calls_only(llava: Model) -> None:
    modules = Llava(llava).encoder_attention()[:1]
    pixels = prompts(llava)["pixel_values"]
    with taps.installed(modules), taps.capture(modules) as captured:
        thread = threading.Thread(target=llava.model.vision_tower, args=(pixels,))
        thread.start()
        thread.join()
    assert list(captured.values()) == [[]]


def test_models_in_threads_do_not_mix() -> None:
    models = [tiny_llava(seed=seed) for seed in range(3)]
    inputs = [prompts(model, [1], seed=seed) for seed, model in enumerate(models)]

    def run(number: int, results: dict[int, Any]) -> None:
        with reduce_tokens(models[number], create("fopru_rank")) as attachment, torch.no_grad():
            for _ in range(3):
                results[number] = models[number](**inputs[number]).logits, attachment.samples

    alone: dict[int, Any] = {}
    together: dict[int, Any] = {}
    for number in range(3):
        run(number, alone)
    threads = [threading.Thread(target=run, args=(number, together)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert torch.equal(alone[number][0], together[number][0])
        assert alone[number][1] == together[number][1]
