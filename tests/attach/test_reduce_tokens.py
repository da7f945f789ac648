"""Inside ``reduce_tokens`` a caller's code is unchanged, and what cannot work is refused."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    LlavaConfig,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers import (
    LlavaForConditionalGeneration as Model,
)
from transformers.generation.streamers import BaseStreamer

from tokenreduce import create, reduce_tokens
from tokenreduce.testing import Identity, prompts, tiny_llava

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


@pytest.fixture
def batch(llava: Model) -> dict[str, Tensor]:
    """Four prompts of different lengths with one, three, no and one picture."""
    return prompts(llava, [1, 3, 0, 1])


@pytest.mark.parametrize("rows", [[1], [1, 1, 1, 1], [1, 3, 0, 1]], ids=str)
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_identity_is_bit_identical(rows: list[int], positions: Any, key_heads: int) -> None:
    model = tiny_llava(key_heads=key_heads)
    inputs = prompts(model, rows)
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, do_sample=False, max_new_tokens=10)
        with reduce_tokens(model, Identity(positions=positions)):
            valid = inputs["attention_mask"].bool()
            assert torch.equal(model(**inputs).logits[valid], logits[valid])
            assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=10), tokens)


@pytest.mark.parametrize("name", ["fopru_rank", "fopru_row", "pool", "downsample", "no_image"])
def test_the_callers_own_slicing_works(llava: Model, batch: dict[str, Tensor], name: str) -> None:
    length = batch["input_ids"].shape[1]
    with reduce_tokens(llava, name):
        out = llava.generate(**batch, **GREEDY)
    assert torch.equal(out[:, :length], batch["input_ids"])
    assert out.shape[1] == length + 5


def test_every_way_of_generating_tells_the_same(llava: Model, batch: dict[str, Tensor]) -> None:
    length = batch["input_ids"].shape[1]
    with reduce_tokens(llava, "fopru_rank"):
        expected = llava.generate(**batch, **GREEDY)
        by_length = llava.generate(**batch, do_sample=False, max_length=length + 5)
        by_config = llava.generate(
            **batch, generation_config=GenerationConfig(max_length=length + 5, do_sample=False, pad_token_id=0)
        )
        positional = llava.generate(
            batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"}, **GREEDY
        )
        as_dict = llava.generate(**batch, **GREEDY, return_dict_in_generate=True).sequences
        lookup = [llava.generate(**_row(llava, batch, 0), **GREEDY, prompt_lookup_num_tokens=2)]
        uncached = llava.generate(**batch, **GREEDY, use_cache=False)
    for found in (by_length, by_config, positional, as_dict, uncached):
        assert torch.equal(found, expected)
    assert torch.equal(lookup[0][0, -5:], expected[0, -5:])


def test_generating_keeps_nothing_for_gradients(llava: Model, batch: dict[str, Tensor]) -> None:
    tracked = []
    hook = llava.model.multi_modal_projector.register_forward_hook(
        lambda module, inputs, output: tracked.append(output.requires_grad)
    )
    with hook, reduce_tokens(llava, "uniform"):
        llava.generate(**batch, **GREEDY)
    assert tracked == [False]


def test_beams_and_return_sequences(llava: Model, batch: dict[str, Tensor]) -> None:
    options = {"do_sample": False, "max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    with reduce_tokens(llava, Identity()):
        same = llava.generate(**batch, **options)
    assert torch.equal(same, llava.generate(**batch, **options))
    with reduce_tokens(llava, "fopru_rank"):
        together = llava.generate(**batch, **options)
        alone = torch.cat([llava.generate(**_row(llava, batch, row), **options)[:, -5:] for row in range(4)])
    assert torch.equal(together[:, -5:], alone)


def test_a_conversation_goes_on_with_the_returned_cache(llava: Model, batch: dict[str, Tensor]) -> None:
    with reduce_tokens(llava, "fopru_rank"):
        first = llava.generate(**batch, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.full((4, 3), 17)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(4, 8, dtype=torch.long)], dim=1)
        with_cache = llava.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
        afresh = llava.generate(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"], **GREEDY)
    assert torch.equal(with_cache, afresh)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_hand_written_loop_equals_generate(llava: Model, batch: dict[str, Tensor], positions: Any) -> None:
    inputs = prompts(llava, [1, 1])  # equal lengths: plain forward calls count padding as positions, generate does not
    inputs = {name: value[:1] for name, value in inputs.items()}
    valid = inputs["attention_mask"][0].bool()
    inputs |= {"input_ids": inputs["input_ids"][:, valid], "attention_mask": inputs["attention_mask"][:, valid]}
    with reduce_tokens(llava, create("fopru_rank", positions=positions)), torch.no_grad():
        expected = llava.generate(**inputs, **GREEDY)[:, -5:]
        output, mask, tokens = llava(**inputs), inputs["attention_mask"], []
        for _ in range(5):
            tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, mask[:, :1]], dim=1)
            output = llava(input_ids=tokens[-1], attention_mask=mask, past_key_values=output.past_key_values)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


def test_callbacks_see_the_callers_prompt(llava: Model, batch: dict[str, Tensor]) -> None:
    seen: list[Tensor] = []
    length = batch["input_ids"].shape[1]

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(input_ids)
            return scores

    class StopAfterTwo(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 2)

    allowed_lengths: list[int] = []

    def allowed(row: int, ids: Tensor) -> list[int]:
        allowed_lengths.append(len(ids))
        return list(range(4, 100))

    with reduce_tokens(llava, "fopru_rank"):
        out = llava.generate(
            **batch,
            do_sample=False,
            max_new_tokens=5,
            logits_processor=[Watch()],
            stopping_criteria=[StopAfterTwo()],
            prefix_allowed_tokens_fn=allowed,
        )
    assert out.shape[1] == length + 2
    assert all(torch.equal(ids[:, :length], batch["input_ids"]) for ids in seen)
    assert set(allowed_lengths) == {length, length + 1}


def test_a_repetition_penalty_counts_the_text_once(llava: Model) -> None:
    inputs = prompts(llava, [1, 1])
    with reduce_tokens(llava, Identity()):
        same = llava.generate(**inputs, **GREEDY, repetition_penalty=1.5)
    assert torch.equal(same, llava.generate(**inputs, **GREEDY, repetition_penalty=1.5))


def test_a_streamer_in_another_thread(llava: Model) -> None:
    inputs = prompts(llava, [1])

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.parts: queue.Queue[Tensor | None] = queue.Queue()

        def put(self, value: Tensor) -> None:
            self.parts.put(value)

        def end(self) -> None:
            self.parts.put(None)

    streamer = Collect()
    with reduce_tokens(llava, "fopru_row"):
        expected = llava.generate(**inputs, **GREEDY)
        thread = threading.Thread(target=llava.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
        thread.start()
        parts = list(iter(lambda: streamer.parts.get(timeout=60), None))
        thread.join()
    assert torch.equal(torch.cat([part.flatten() for part in parts if part is not None]), expected[0])


def test_text_alone_passes_through(llava: Model) -> None:
    inputs = prompts(llava, [0, 0])
    with reduce_tokens(llava, "fopru_rank"):
        out = llava.generate(**inputs, **GREEDY)
    assert torch.equal(out, llava.generate(**inputs, **GREEDY))


def test_no_image_answers_as_if_none_had_been_given(llava: Model) -> None:
    inputs = prompts(llava, [1])
    text = inputs["input_ids"][inputs["input_ids"] != llava.config.image_token_id][None]
    with reduce_tokens(llava, "no_image"):
        out = llava.generate(**inputs, **GREEDY)
    assert torch.equal(out[:, -5:], llava.generate(text, **GREEDY)[:, -5:])


def test_two_models_in_contexts_that_end_in_any_order() -> None:
    first, second = tiny_llava(seed=1), tiny_llava(seed=2)
    inputs = prompts(first, [1])
    plain = [model.generate(**inputs, **GREEDY) for model in (first, second)]
    one, two = reduce_tokens(first, "fopru_rank"), reduce_tokens(second, "fopru_rank")
    one.__enter__()
    reduced_first = first.generate(**inputs, **GREEDY)
    two.__enter__()
    one.__exit__(None, None, None)
    reduced_second = second.generate(**inputs, **GREEDY)
    assert torch.equal(first.generate(**inputs, **GREEDY), plain[0])
    two.__exit__(None, None, None)
    assert torch.equal(second.generate(**inputs, **GREEDY), plain[1])
    for model, reduced in ((first, reduced_first), (second, reduced_second)):
        with reduce_tokens(model, "fopru_rank"):
            assert torch.equal(model.generate(**inputs, **GREEDY), reduced)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, inputs: model(**inputs, labels=inputs["input_ids"]), "labels"),
        (lambda model, inputs: model(**inputs, logits_to_keep=torch.tensor([0])), "logits_to_keep"),
        (lambda model, inputs: model.generate(inputs_embeds=torch.zeros(1, 4, 64)), "inputs_embeds"),
        (lambda model, inputs: model.generate(**inputs, prefill_chunk_size=5), "prefill_chunk_size"),
        (lambda model, inputs: model.generate(**inputs, mm_encoder_outputs={}), "mm_encoder_outputs"),
        (
            lambda model, inputs: model.generate(inputs["input_ids"][:, 5:], pixel_values=inputs["pixel_values"]),
            "placeholders",
        ),
        (lambda model, inputs: model(**inputs, past_key_values=_filled_cache(model)), "whole conversation again"),
    ],
)
def test_what_cannot_be_reduced_is_refused(llava: Model, call: Callable[..., Any], message: str) -> None:
    with reduce_tokens(llava, "fopru_rank"), pytest.raises(ValueError, match=message):
        call(llava, prompts(llava, [1]))


def test_attaching_twice_is_refused(llava: Model) -> None:
    with (
        reduce_tokens(llava, "fopru_rank"),
        pytest.raises(ValueError, match="already has a reducer"),
        reduce_tokens(llava, "uniform"),
    ):
        pass
    with reduce_tokens(llava, "uniform"):
        pass


def test_an_unsupported_model_is_refused_by_name() -> None:
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
    }
    config = AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", **vision}, text_config={"model_type": "cohere2", **text}
    )
    model = AyaVisionForConditionalGeneration(config)
    with (
        pytest.raises(ValueError, match="AyaVisionForConditionalGeneration are not supported; supported: Gemma3"),
        reduce_tokens(model, "uniform"),
    ):
        pass


def test_a_model_whose_tokens_are_no_grid_is_refused(llava: Model) -> None:
    config = LlavaConfig.from_dict({**llava.config.to_dict(), "vision_feature_select_strategy": "full"})
    with pytest.raises(ValueError, match="would not form the patch grid"), reduce_tokens(Model(config), "uniform"):
        pass


def test_knobs_go_with_a_name(llava: Model) -> None:
    with pytest.raises(TypeError, match="keep cannot be set"), reduce_tokens(llava, create("uniform"), keep=3):
        pass


def test_a_count_above_the_tokens_there_are_is_refused(llava: Model) -> None:
    with pytest.raises(ValueError, match="more than the 36 visual tokens"), reduce_tokens(llava, "uniform", keep=37):
        pass


def _row(model: Model, batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt of ``batch`` by itself, without padding."""
    valid = batch["attention_mask"][row].bool()
    single = {
        "input_ids": batch["input_ids"][row, valid][None],
        "attention_mask": batch["attention_mask"][row, valid][None],
    }
    tokens = model.config.image_seq_length
    counts = (batch["input_ids"] == model.config.image_token_id).sum(-1) // tokens
    start = int(counts[:row].sum())
    if counts[row]:
        single["pixel_values"] = batch["pixel_values"][start : start + int(counts[row])]
    return single


def _filled_cache(model: Model) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model.model.language_model(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=cache)
    return cache
