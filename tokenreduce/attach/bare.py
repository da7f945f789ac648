"""Reducers on a language model that gets its visual tokens as embeddings, without a vision tower before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenreduce.attach.attachment import method
from tokenreduce.attach.decoder import DecoderSite, Prefill
from tokenreduce.reducer import AtDecoder, Geometry, Grid, TokenReducer


@contextmanager
def reduce_decoder_tokens(
    model: PreTrainedModel, reducer: TokenReducer, visual_spans: Sequence[tuple[int, int]]
) -> Iterator[list[Prefill]]:
    """Run the decoder steps of ``reducer`` in a plain causal language model.

    ``visual_spans`` gives for every row the first column of its visual tokens and the one after the last. Yields a list
    to which every prefill within the context is added. Raises ``ValueError`` for a reducer that acts at another site.
    """
    decoder: Any = model.get_decoder()
    geometry = Geometry(encoder_layers=0, decoder_layers=len(decoder.layers), feature_layer=0, class_token=False)
    steps = reducer.steps(geometry)
    inside = [step for step in steps if isinstance(step, AtDecoder)]
    if len(inside) < len(steps):
        raise ValueError(f"{type(reducer).__name__} acts before the language model, which a bare decoder cannot host")
    site = DecoderSite(reducer, inside, decoder, geometry)
    prefills: list[Prefill] = []

    def forward(original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return original(**inputs)
        given = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        columns = torch.arange(given.shape[1], device=given.device)
        visual = torch.stack([(start <= columns) & (columns < end) for start, end in visual_spans])
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(visual) if mask is None else mask.bool()
        with site.prefill(visual, valid, [(Grid(1, end - start),) for start, end in visual_spans]) as prefill:
            prefills.append(prefill)
            return original(**inputs)

    with site.installed():
        model.forward = method(forward, model.forward)
        try:
            yield prefills
        finally:
            del model.forward
