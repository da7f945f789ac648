"""Calls at the same time, in threads and inside one another, on one model and on several: each is as if alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration as Model
from transformers.generation.streamers import BaseStreamer

from tokenreduce import create, reduce_tokens
from tokenreduce.testing import prompts, tiny_llava

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
IMAGES = ([1, 1], [2], [0, 2], [2, 0, 0])
"""Two pictures in every batch, so that threads in step call the tower equally often, in rows that differ."""
REDUCERS = {
    "fastv": create("fastv", keep=0.5, layer=1),
    "pyramiddrop": create("pyramiddrop"),
    "dart": create("dart", keep=0.5, layer=1),
    "sparsevlm": create("sparsevlm", layers=(0, 1), keeps=(0.6, 0.3)),
    "fopru_rank": create("fopru_rank", keep=0.5),
    "tome": create("tome", keep=0.5),
    "visionzip": create("visionzip", keep=0.5),
    "chain": create("chain", reducers=({"name": "fopru_rank", "keep": 0.5}, {"name": "fastv", "layer": 2})),
}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", REDUCERS)
def test_threads_on_one_model_get_what_they_would_get_alone(llava: Model, name: str, count: int) -> None:
    batches = [prompts(llava, images, seed=seed) for seed, images in enumerate(IMAGES[:count])]
    with reduce_tokens(llava, REDUCERS[name]) as attachment:

        def answer(number: int) -> tuple[Tensor, Any]:
            answers = llava.generate(**batches[number], **GREEDY)
            return answers, attachment.samples

        alone = [answer(number) for number in range(count)]
        with in_step(llava, count) as barrier:

            def answer_together(number: int) -> tuple[Tensor, Any]:
                answers = llava.generate(**batches[number], **GREEDY)
                barrier.wait()  # all calls have ended before anybody asks what was done in theirs
                return answers, attachment.samples

            together = in_threads(answer_together, count, barrier)
    for (expected, samples), (answers, noted) in zip(alone, together, strict=True):
        assert torch.equal(answers, expected)
        assert noted == samples


@pytest.mark.parametrize("name", REDUCERS)
def test_a_forward_call_in_another_thread_changes_nothing(llava: Model, name: str) -> None:
    """Forward calls, whose notes are the asking thread's own."""
    batches = [prompts(llava, images, seed=seed) for seed, images in enumerate(IMAGES[:2])]
    with reduce_tokens(llava, REDUCERS[name]) as attachment, torch.no_grad():
        llava(**batches[0])
        samples, prompt = attachment.samples, attachment.prompt

        def elsewhere(number: int) -> Any:
            with torch.no_grad():
                llava(**batches[1 + number])
            return attachment.samples

        (noted,) = in_threads(elsewhere, 1, threading.Barrier(1))
        assert noted != samples
        assert attachment.samples == samples
        assert attachment.prompt is prompt


@pytest.mark.parametrize("name", REDUCERS)
def test_several_models_in_nested_contexts_that_end_in_any_order(name: str) -> None:
    models = [tiny_llava(seed=seed) for seed in range(3)]
    batches = [
        prompts(model, images, seed=seed) for seed, (model, images) in enumerate(zip(models, IMAGES, strict=False))
    ]
    plain = [model.generate(**batch, **GREEDY) for model, batch in zip(models, batches, strict=True)]
    reduced = []
    for model, batch in zip(models, batches, strict=True):
        with reduce_tokens(model, REDUCERS[name]):
            reduced.append(model.generate(**batch, **GREEDY))
    contexts = [reduce_tokens(model, REDUCERS[name]) for model in models]
    for context in contexts:
        context.__enter__()
    attached = set(range(3))
    for ended in (0, 2, 1):
        for number, (model, batch) in enumerate(zip(models, batches, strict=True)):
            expected = reduced[number] if number in attached else plain[number]
            assert torch.equal(model.generate(**batch, **GREEDY), expected), (number, attached)
        contexts[ended].__exit__(None, None, None)
        attached.remove(ended)
    for model, batch, expected in zip(models, batches, plain, strict=True):
        assert torch.equal(model.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("inner", ["the same model", "another model"])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_call_within_a_streamer_of_another_call(name: str, inner: str) -> None:
    outer_model = tiny_llava(seed=1)
    inner_model = outer_model if inner == "the same model" else tiny_llava(seed=2)
    first, second = prompts(outer_model, [1], seed=1), prompts(inner_model, [2, 0], seed=2)
    with ExitStack() as stack:
        notes = {
            model: stack.enter_context(reduce_tokens(model, REDUCERS[name])) for model in {outer_model, inner_model}
        }
        expected_inner = inner_model.generate(**second, **GREEDY)
        inner_samples = notes[inner_model].samples
        expected = outer_model.generate(**first, **GREEDY)
        outer_samples = notes[outer_model].samples
        within: list[tuple[Tensor, Any]] = []

        class Nested(BaseStreamer):
            def put(self, value: Tensor) -> None:
                within.append((inner_model.generate(**second, **GREEDY), notes[inner_model].samples))

            def end(self) -> None: ...

        assert torch.equal(outer_model.generate(**first, **GREEDY, streamer=Nested()), expected)
        assert notes[outer_model].samples == outer_samples
    assert len(within) == 5
    for answers, samples in within:
        assert torch.equal(answers, expected_inner)
        assert samples == inner_samples


def test_threads_with_a_model_each_that_attach_and_end_at_the_same_time() -> None:
    models = [tiny_llava(seed=seed) for seed in range(4)]
    names = ["fastv", "visionzip", "tome", "sparsevlm"]
    batches = [
        prompts(model, images, seed=seed) for seed, (model, images) in enumerate(zip(models, IMAGES, strict=True))
    ]

    def answer(number: int, barrier: threading.Barrier) -> tuple[Tensor, Any]:
        barrier.wait()
        with reduce_tokens(models[number], REDUCERS[names[number]]) as attachment:
            barrier.wait()
            answers = models[number].generate(**batches[number], **GREEDY)
            return answers, attachment.samples

    alone = [answer(number, threading.Barrier(1)) for number in range(4)]
    barrier = threading.Barrier(4, timeout=30)
    together = in_threads(lambda number: answer(number, barrier), 4, barrier)
    for (expected, samples), (answers, noted) in zip(alone, together, strict=True):
        assert torch.equal(answers, expected)
        assert noted == samples


@contextmanager
def in_step(model: Model, count: int) -> Iterator[threading.Barrier]:
    """Let ``count`` threads that call ``model`` wait for one another before the tower, the language model and each of
    its layers."""
    barrier, decoder = threading.Barrier(count, timeout=30), model.model.language_model

    def wait(*_: Any) -> None:
        barrier.wait()

    with ExitStack() as stack:
        for module in (model.model.vision_tower, decoder, *decoder.layers):
            stack.callback(module.register_forward_pre_hook(wait).remove)
        yield barrier


def in_threads(work: Callable[[int], Any], count: int, barrier: threading.Barrier) -> list[Any]:
    """``work`` of every number in a thread of its own. Raises the first error of any, at which nobody waits longer."""
    results: dict[int, Any] = {}
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]
