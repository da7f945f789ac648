"""The back end that runs a model of transformers in this process, with reducers attached to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenreduce import flops
from tokenreduce.attach import SampleReduction
from tokenreduce.budget import Budget, Solution
from tokenreduce.evaluation import clock, roofline
from tokenreduce.evaluation.backend import Answer, Times
from tokenreduce.evaluation.clock import attached
from tokenreduce.evaluation.costs import prefill_cost, within_budget
from tokenreduce.evaluation.identity import model_identity, processor_identity
from tokenreduce.evaluation.prompts import Prompt
from tokenreduce.evaluation.result import Limits, Roofline
from tokenreduce.evaluation.vision_memory import VisionMemory
from tokenreduce.reducer import TokenReducer

CACHED_BYTES = 512 << 20
"""Inputs up to this size are kept, because several methods are asked the same questions."""


class TransformersBackend:
    """Answers left-padded batches with ``generate``; implements
    :class:`~tokenreduce.evaluation.backend.MeasuredBackend`.

    Prompts are put into words by the processor's own chat template, which it must have.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._vision = VisionMemory(model)
        self._inputs: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._room = CACHED_BYTES

    @property
    def image_tokens(self) -> list[str]:
        names = ("image_token", "video_token", "boi_token")
        return [str(token) for name in names if (token := getattr(self.processor, name, None))]

    def answer(
        self, prompts: Sequence[Prompt], reducer: TokenReducer, max_new_tokens: int, *, share_vision: bool = False
    ) -> list[Answer]:
        inputs = self.inputs(prompts)
        started = time.perf_counter()
        shared = self._vision.recalled([prompt.id for prompt in prompts]) if share_vision else nullcontext()
        with shared, self._attached(reducer, prompts) as reduction:
            tokens = self._generate(inputs, max_new_tokens)
            reductions: list[SampleReduction] = list(reduction.samples)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        seconds = (time.perf_counter() - started) / len(prompts)
        costs = prefill_cost(self.model, reductions)
        return [Answer(*parts, seconds) for parts in zip(texts, reductions, costs, strict=True)]

    def forget(self) -> None:
        self._inputs.clear()
        self._room = CACHED_BYTES
        self._vision.forget()

    def identity(self) -> dict[str, Any]:
        return {"model": model_identity(self.model), "processor": processor_identity(self.processor)}

    def solve(self, reducer: TokenReducer, budget: Budget, prompts: Sequence[Prompt]) -> Solution:
        inputs, questions = [self.inputs([prompt]) for prompt in prompts], [prompt.question for prompt in prompts]
        return within_budget(self.model, reducer, budget, inputs, questions, self.processor)

    def paper_flops(self, lengths: Sequence[int]) -> float:
        return flops.paper_flops(lengths, self.model.config.get_text_config())

    def limits(self) -> Limits:
        return roofline.limits(self.model)

    def roofline(self, llm_flops: float, kv_bytes: float) -> Roofline:
        return roofline.roofline(self.model, llm_flops, kv_bytes)

    def times(
        self,
        reducers: Mapping[str, Sequence[TokenReducer | None]],
        prompts: Sequence[Prompt],
        pairs: int,
        advance: Callable[[], None] = lambda: None,
    ) -> dict[str, Times]:
        inputs, questions = [self.inputs([prompt]) for prompt in prompts], [prompt.question for prompt in prompts]
        return clock.take_times(self.model, reducers, inputs, pairs, advance, questions, self.processor)

    def peak_memory(self, prompts: Sequence[Prompt], reducer: TokenReducer | None, max_new_tokens: int) -> int | None:
        inputs = self.inputs(prompts)
        with self._attached(reducer, prompts):
            return clock.peak_memory(self.model.device, partial(self._generate, inputs, max_new_tokens))

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """One batch on the model's device, in its precision; what the processor made of it is kept."""
        key = tuple(prompt.id for prompt in prompts)
        inputs = self._inputs.get(key)
        if inputs is None:
            inputs = self._prepared(prompts)
            size = sum(tensor.nbytes for tensor in inputs.values())
            if size <= self._room:
                self._room -= size
                self._inputs[key] = inputs
        return {
            name: tensor.to(self.model.device, self.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    def _attached(self, reducer: TokenReducer | None, prompts: Sequence[Prompt]) -> AbstractContextManager[Any]:
        return attached(self.model, reducer, [prompt.question for prompt in prompts], self.processor)

    @torch.inference_mode()
    def _generate(self, inputs: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
        """Prompts and greedy answers, as token ids."""
        generate: Callable[..., Tensor] = self.model.generate
        return generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)

    def _prepared(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        images = [prompt.images() for prompt in prompts]
        texts = self.processor.apply_chat_template(
            [_conversation(prompt.text, len(shown)) for prompt, shown in zip(prompts, images, strict=True)],
            add_generation_prompt=True,
            tokenize=False,
        )
        tokenizer = getattr(self.processor, "tokenizer", None)
        begins = getattr(tokenizer, "bos_token", None)
        inputs = self.processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="left",
            # A template may write the begin-of-text token itself; the tokenizer must not add a second one.
            add_special_tokens=not (begins and texts[0].startswith(begins)),
            return_tensors="pt",
        )
        # PaliGemma's processor makes training targets too.
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}


def _conversation(text: str, images: int) -> list[dict[str, Any]]:
    words = {"type": "text", "text": text}
    return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), words]}]
