"""The small language models of the end-to-end vectors, and runs of them through the attaching code."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tokenreduce.attach.bare import reduce_decoder_tokens
from tokenreduce.attach.stage import Prefill
from tokenreduce.reducer import AtDecoder, TokenReducer
from tokenreduce.testing import Identity

from .golden import FOLDER, Case


@functools.cache
def language_model(name: str) -> LlamaForCausalLM:
    config = LlamaConfig(**json.loads((FOLDER / f"e2e_model_{name}.config.json").read_text()))
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(FOLDER / f"e2e_model_{name}.safetensors"))
    model.generation_config.pad_token_id = 0
    return model.eval()


@dataclass(frozen=True)
class Run:
    """What a reduced model did.

    logits:          ``(left, vocabulary)`` of a forward call.
    tokens:          the greedy continuation, and
    token_logits:    ``(tokens, vocabulary)`` that they were taken from.
    index:           after every step, which of the visual tokens that entered are left.
    entering:        ``(left, dim)``, what the layers asked for were given.
    lengths:         how many tokens every layer's cache holds after the prompt.
    decode_positions: ``(tokens - 1, layers)``.
    """

    logits: Tensor
    tokens: list[int]
    token_logits: Tensor
    index: list[Tensor]
    entering: dict[int, Tensor]
    lengths: list[int]
    decode_positions: Tensor


def run(case: Case, reducer: TokenReducer, watched: Sequence[int] = ()) -> Run:
    """Prefill and decode one end-to-end case."""
    model, embeddings = language_model(case.about["model"]), case.given["inputs_embeds"]
    entering: dict[int, Tensor] = {}
    positions: list[list[int]] = []

    def watch(layer: int) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer in watched:
                entering.setdefault(layer, args[0][0])
            if args[0].shape[1] == 1:
                if layer == 0:
                    positions.append([])
                positions[-1].append(int(kwargs["position_ids"]))

        return before

    with reduce_decoder_tokens(model, reducer, [tuple(case.about["image_span"])]) as prefills, torch.no_grad():
        hooks = [
            layer.register_forward_pre_hook(watch(number), with_kwargs=True)
            for number, layer in enumerate(model.model.layers)
        ]
        try:
            cache = DynamicCache()
            logits = model(inputs_embeds=embeddings, past_key_values=cache).logits[0]
            generated = model.generate(
                inputs_embeds=embeddings,
                max_new_tokens=len(case.expected["tokens"]),
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
    prefill: Prefill = prefills[0]
    return Run(
        logits=logits,
        tokens=generated.sequences[0].tolist(),
        token_logits=torch.cat(generated.logits),
        index=[torch.tensor(step.index) for step in prefill.strands[0].journey.tracks[0].steps],
        entering=entering,
        lengths=[layer.get_seq_length() for layer in cache.layers],
        decode_positions=torch.tensor(positions),
    )


def assert_official(case: Case, found: Run) -> None:
    """Logits, tokens, cache lengths and decode positions are the official ones."""
    torch.testing.assert_close(found.logits, case.expected["logits"], atol=2e-5, rtol=0.0)
    torch.testing.assert_close(found.token_logits, case.expected["token_logits"], atol=2e-5, rtol=0.0)
    assert found.tokens == case.expected["tokens"].tolist()
    assert found.lengths == case.about["kv_cache_length_per_layer_after_prefill"]
    assert found.decode_positions.equal(case.expected["decode_positions"])


UNREDUCED = Identity(site=AtDecoder(layer=2, keep=1.0))
"""What a sensitivity entry means by "without reduction", through all of the attaching code."""


def last_logit_change(case: Case, found: Run) -> float:
    """How far a mistake moved the last prompt token's logits."""
    return float((found.logits[-1] - case.expected["logits"][-1]).abs().max())
