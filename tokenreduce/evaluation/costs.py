"""The cost of a prefill in three currencies: tokens that enter the language model, layer mean, and prefill FLOPs.

All are summed from the lengths that the decoder layers really saw; :mod:`tokenreduce.flops` says what a FLOP is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenreduce.attach import reduce_tokens
from tokenreduce.budget import Budget, Solution, solve
from tokenreduce.counts import Layout
from tokenreduce.flops import decoder_flops, key_width
from tokenreduce.models.family import Inputs, ModelFamily, family_of
from tokenreduce.passage import SampleReduction
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import MODELS


@dataclass(frozen=True)
class Cost:
    """The prefill of one sample.

    entering:     visual tokens that enter the language model
    layer_mean:   visual tokens at the input of a decoder layer, averaged over layers
    vision_flops: vision tower and projector
    llm_flops:    the decoder layers, and the output layer for the last position
    kv_bytes:     the key-value cache after prefill
    """

    entering: int
    layer_mean: float
    vision_flops: float
    llm_flops: float
    kv_bytes: int


def prefill_cost(model: PreTrainedModel, samples: Sequence[SampleReduction], causal: bool = True) -> list[Cost]:
    """The cost of prefilling every sample of a reduced call."""
    family = family_of(model, MODELS.usable())
    return [sample_cost(family, sample, causal) for sample in samples]


def sample_cost(family: ModelFamily, sample: SampleReduction, causal: bool = True) -> Cost:
    """The cost of prefilling one sample."""
    config = family.model.config.get_text_config()
    text = sample.lengths[0] - sample.entering
    patches = [image.encoded for image in sample.images]
    return Cost(
        entering=sample.entering,
        layer_mean=sum(length - text for length in sample.lengths) / len(sample.lengths),
        vision_flops=sum(family.vision_flops(count) for count in patches if count),
        llm_flops=decoder_flops(sample.lengths, config, causal),
        kv_bytes=sum(sample.lengths) * 2 * key_width(config) * family.model.dtype.itemsize,
    )


def within_budget(
    model: PreTrainedModel,
    reducer: TokenReducer,
    budget: Budget,
    prompts: Iterable[Inputs],
    questions: Sequence[str] | None = None,
    processor: Any = None,
) -> Solution:
    """Hold a reducer to a budget on this model (:func:`tokenreduce.budget.solve`).

    ``prompts`` are single-row inputs of ``generate``: the pictures and texts that costs are averaged over. An adaptive
    reducer is run on them; one that reads the question needs to be told ``questions``, and perhaps the ``processor``.
    """
    family, prompts = family_of(model, MODELS.usable()), list(prompts)
    layouts = [layout(family, inputs) for inputs in prompts]
    asked: Sequence[str | None] = questions or [None] * len(prompts)

    def measure(candidate: TokenReducer) -> list[list[int]]:
        counts = []
        for inputs, question in zip(prompts, asked, strict=True):
            attached = reduce_tokens(model, candidate, question=question, processor=processor)
            with attached as attachment, torch.inference_mode():
                model(**inputs, logits_to_keep=1)
            (sample,) = attachment.samples
            text = sample.lengths[0] - sample.entering
            counts.append([length - text for length in sample.lengths])
        return counts

    return solve(reducer, budget, family.geometry, layouts, model.config.get_text_config(), measure)


def layout(family: ModelFamily, inputs: Inputs) -> Layout:
    """The layout of a single prompt, known before anything is computed."""
    pictures = family.pictures(inputs)
    visual = sum(len(picture.tokens) for picture in pictures)
    return Layout(
        tiles=tuple(tile.described(place) for place, picture in enumerate(pictures) for tile in picture.tiles),
        special=sum(int((picture.tokens < 0).sum()) for picture in pictures),
        text=int(inputs["attention_mask"].sum()) - visual,
    )
