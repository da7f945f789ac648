"""FLOPs are checked against torch's own counter, lengths and bytes against the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.counts import layer_counts
from tokenreduce.evaluation.costs import layout, prefill_cost
from tokenreduce.flops import decoder_flops, decoder_layer_flops, paper_flops
from tokenreduce.models.family import family_of
from tokenreduce.models.loading import load
from tokenreduce.registry import MODELS
from tokenreduce.testing import prompts, tiny_llava
from tokenreduce.testing.checkpoints import ask, picture, recipes


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("name", ["none", "uniform", "downsample", "no_image", "vtw"])
def test_flops_agree_with_torchs_counter(name: str, key_heads: int) -> None:
    model = tiny_llava(key_heads=key_heads)
    inputs = prompts(model, [2])
    # The counter sees nothing of fused CPU attention, so the math kernel is forced; it computes the whole square.
    with reduce_tokens(model, create(name)) as attachment, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        counter = FlopCounterMode(display=False)
        with counter:
            model(**inputs, logits_to_keep=1)
    (cost,) = prefill_cost(model, attachment.samples, causal=False)
    assert cost.vision_flops + cost.llm_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("family", recipes())
def test_on_every_family_flops_and_lengths_are_known_in_advance(family: str, checkpoint: Callable[[str], Path]) -> None:
    model, processor = load(str(checkpoint(family)), attention=recipes()[family].attention)
    inputs = ask(processor, [[picture(1, 60, 90)]])
    served = family_of(model, MODELS.usable())
    before = layout(served, inputs)
    for reducer in (create("uniform"), create("vtw")):
        with reduce_tokens(model, reducer) as attachment, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            counter = FlopCounterMode(display=False)
            with counter:
                model(**inputs, logits_to_keep=1)
        (cost,) = prefill_cost(model, attachment.samples, causal=False)
        counts = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
        llm = [count for name, count in counts.items() if name.endswith(("language_model", "text_model", "lm_head"))]
        assert cost.llm_flops == pytest.approx(sum(llm), rel=0.01)
        # SigLIP's own pooling runs in LLaVA though nobody uses it, and is not counted.
        rest = 0.06 if family == "llava_siglip" else 0.01
        assert cost.vision_flops == pytest.approx(counter.get_total_flops() - sum(llm), rel=rest)
        (sample,) = attachment.samples
        counted = layer_counts(reducer, served.geometry, before)
        lines = {before.text + count - length for count, length in zip(counted, sample.lengths, strict=True)}
        assert lines <= set(range(before.special + 1))  # a newline goes with its whole line, which is not foreseen


def test_a_sliding_window_bounds_what_causal_attention_computes() -> None:
    config = LlamaConfig(num_hidden_layers=2, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    full, windowed = decoder_layer_flops(12, config), decoder_layer_flops(12, config, window=5)
    pairs = {window: sum(min(row, window) for row in range(1, 13)) for window in (5, 12)}
    assert full - windowed == 4 * (pairs[12] - pairs[5]) * config.hidden_size
    assert decoder_flops([12, 12], config) == full + windowed + 2 * config.hidden_size * config.vocab_size
    assert decoder_layer_flops(12, config, causal=False, window=5) == decoder_layer_flops(12, config, causal=False)


def test_lengths_and_bytes_are_those_of_the_cache(llava: LlavaForConditionalGeneration) -> None:
    inputs, cache = prompts(llava, [1]), DynamicCache()
    with reduce_tokens(llava, "uniform", keep=9) as attachment, torch.no_grad():
        llava(**inputs, past_key_values=cache)
    (cost,) = prefill_cost(llava, attachment.samples)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.kv_bytes == stored
    assert (cost.entering, cost.layer_mean) == (9, 9)


def test_causal_attention_is_half_the_square(llava: LlavaForConditionalGeneration) -> None:
    inputs = prompts(llava, [1])
    with reduce_tokens(llava, "none") as attachment, torch.no_grad():
        llava(**inputs)
    causal, square = (prefill_cost(llava, attachment.samples, causal=flag)[0].llm_flops for flag in (True, False))
    assert causal < square


def test_the_papers_formula_gives_the_papers_figures() -> None:
    config = LlamaConfig()  # 7B: 32 layers, width 4096, inner width 11008
    text = 64
    assert paper_flops([576 + text] * 32, config) / 1e12 == pytest.approx(3.33, abs=0.005)
    assert paper_flops([576 + text] * 2 + [288 + text] * 30, config) / 1e12 == pytest.approx(1.90, abs=0.005)
    assert paper_flops([576 + text] * 32, config, feed_forward_matrices=3) / 1e12 == pytest.approx(4.25, abs=0.005)
