"""Translating what a caller of ``generate`` says about lengths and token ids to a shortened prompt, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tokenreduce.attach.prompt import Prompt


def translated(inputs: dict[str, Any], prompt: Prompt, defaults: GenerationConfig) -> dict[str, Any]:
    """The arguments of ``generate`` with total lengths lowered, and with callbacks that still see the caller's own
    prompt."""
    result = dict(inputs)
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(name, inputs, defaults)
        if value and setting(instead, inputs, defaults) is None:
            result[name] = max(0, value - prompt.removed)
    if inputs.get("streamer") is not None:
        result["streamer"] = _Streamer(inputs["streamer"], prompt)
    if inputs.get("logits_processor"):
        result["logits_processor"] = LogitsProcessorList(
            _Processor(each, prompt) for each in inputs["logits_processor"]
        )
    if inputs.get("stopping_criteria"):
        result["stopping_criteria"] = StoppingCriteriaList(
            _Criterion(each, prompt) for each in inputs["stopping_criteria"]
        )
    if (allowed := inputs.get("prefix_allowed_tokens_fn")) is not None:
        result["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([prompt.full[row].to(ids.device), ids[prompt.columns.shape[1] :]])
        )
    return result


def refuse_chunks(inputs: Mapping[str, Any], defaults: GenerationConfig) -> None:
    """Raise ``ValueError`` where the prompt would be prefilled in chunks: one may end amid the visual tokens."""
    if setting("prefill_chunk_size", inputs, defaults):
        raise ValueError("prefill_chunk_size may cut through the visual tokens: prefill the whole prompt at once")


def setting(name: str, inputs: Mapping[str, Any], defaults: GenerationConfig) -> Any:
    """One generation setting, from the first place that ``generate`` looks for it."""
    for value in (
        inputs.get(name),
        getattr(inputs.get("generation_config"), name, None),
        getattr(defaults, name, None),
    ):
        if value is not None:
            return value
    return None


class _Streamer(BaseStreamer):
    """Streams the caller's own prompt instead of the shortened one."""

    def __init__(self, streamer: BaseStreamer, prompt: Prompt) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = prompt.full.cpu()

    def put(self, value: Tensor) -> None:
        value, self._prompt = (value if self._prompt is None else self._prompt), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


class _Processor(LogitsProcessor):
    def __init__(self, processor: Callable[..., Any], prompt: Prompt) -> None:
        self._processor = processor
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._processor(self._prompt.restore(input_ids), scores)


class _Criterion(StoppingCriteria):
    def __init__(self, criterion: Callable[..., Any], prompt: Prompt) -> None:
        self._criterion = criterion
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Any:
        return self._criterion(self._prompt.restore(input_ids), scores, **options)
