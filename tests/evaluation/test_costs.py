"""FLOPs are checked against torch's own counter, lengths and bytes against the cache."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.evaluation.costs import prefill_cost
from tokenreduce.flops import paper_flops
from tokenreduce.testing import prompts, tiny_llava


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("name", ["none", "uniform", "downsample", "no_image"])
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
