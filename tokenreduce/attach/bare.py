"""Reducers on a language model that gets its visual tokens as embeddings, without a vision tower before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenreduce.attach import caches
from tokenreduce.attach.call import Call
from tokenreduce.attach.decoder import DecoderSite
from tokenreduce.attach.hooks import replaced
from tokenreduce.attach.stage import Prefill
from tokenreduce.attach.views import DecoderWatched
from tokenreduce.models.stack import DecoderStack, cache_of
from tokenreduce.passage import Journey
from tokenreduce.reducer import Geometry, Grid, Tile, TokenReducer


class _Decoder:
    """What the decoder site must know of a language model, where there is no family."""

    counts_padding, first_position = True, 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.stack = DecoderStack(model.get_decoder())
        depth = self.stack.depth
        self.geometry = Geometry(encoder_layers=0, decoder_layers=depth, feature_layer=0, class_token=False)


class _Attachment:
    """A reducer in it."""

    question = processor = None

    def __init__(self, model: PreTrainedModel, reducer: TokenReducer, spans: Sequence[tuple[int, int]]) -> None:
        self.model, self.reducer, self.family = model, reducer, _Decoder(model)
        self._spans = spans

    def visual(self, input_ids: Tensor) -> Tensor:
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        return torch.stack([(start <= columns) & (columns < end) for start, end in self._spans])

    def watched(self, site: DecoderSite) -> DecoderWatched:
        watched = DecoderWatched(self.family)  # type: ignore[arg-type]
        for step in site.steps:
            for signal in step.sees:
                signal.watch(watched)
        return watched


@contextmanager
def reduce_decoder_tokens(
    model: PreTrainedModel, reducer: TokenReducer, visual_spans: Sequence[tuple[int, int]]
) -> Iterator[list[Prefill]]:
    """Run the decoder steps of ``reducer`` in a plain causal language model.

    ``visual_spans`` gives for every row the first column of its visual tokens and the one after the last. Yields a list
    to which every prefill within the context is added. Raises ``ValueError`` for a reducer that acts at another site.
    """
    attachment: Any = _Attachment(model, reducer, visual_spans)
    steps: Sequence[Any] = reducer.steps(attachment.family.geometry)
    if any(step.decoder_layer(attachment.family.geometry) is None for step in steps):
        raise ValueError(f"{type(reducer).__name__} acts before the language model, which a bare decoder cannot host")
    site = DecoderSite(attachment, steps)
    prefills: list[Prefill] = []

    def forward(original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        with Call(attachment, inputs).current() as call, ExitStack() as stack:
            cache = cache_of(inputs)
            if cache is None or not cache.get_seq_length():
                for start, end in visual_spans:
                    journey = Journey([Tile(Grid(1, end - start))])
                    places = torch.arange(end - start)
                    journey.enter(torch.stack([torch.zeros_like(places), places], dim=1))
                    call.journeys.append(journey)
                embedded = inputs.get("inputs_embeds")
                ids = inputs["input_ids"] if embedded is None else embedded[..., 0].long()
                stack.enter_context(site.prefilling(call, {**inputs, "input_ids": ids}))
                prefills.extend([call.prefill] if call.prefill else [])
            output = original(**inputs)
        caches.leave(call, inputs, output)
        return output

    with site.installed(), replaced(model, {"forward": forward}):
        yield prefills
