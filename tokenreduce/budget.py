"""What a reduction saves, in three currencies: tokens that enter the language model, layer mean, and prefill FLOPs.

All are summed from the lengths that the decoder layers really saw; :mod:`tokenreduce.flops` says what a FLOP is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from tokenreduce.attach import SampleReduction
from tokenreduce.flops import decoder_layer_flops, key_width
from tokenreduce.models.family import ModelFamily, family_of
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
        llm_flops=sum(decoder_layer_flops(length, config, causal) for length in sample.lengths)
        + 2 * config.hidden_size * config.vocab_size,
        kv_bytes=sum(sample.lengths) * 2 * key_width(config) * family.model.dtype.itemsize,
    )
