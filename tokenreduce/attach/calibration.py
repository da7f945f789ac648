"""Letting a method find its own settings on a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenreduce.attach.attachment import reduce_tokens
from tokenreduce.models.family import family_of
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import MODELS, create


def calibrate(
    model: PreTrainedModel,
    reducer: TokenReducer | type[TokenReducer] | str,
    samples: Iterable[Mapping[str, Any]],
    **settings: Any,
) -> TokenReducer:
    """``reducer`` with the knobs that its own search finds for ``model``: for ``vtw`` the layer.

    ``samples`` are inputs of ``generate`` with one prompt each, as a processor makes them; ``settings`` are the
    search's, such as VTW's ``threshold``. Raises ``TypeError`` for a method without a search, and ``ValueError`` where
    it finds nothing.

    >>> reducer = calibrate(model, "vtw", samples)  # doctest: +SKIP
    >>> with reduce_tokens(model, reducer):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    if not isinstance(reducer, TokenReducer):
        reducer = create(reducer)

    def answer(inputs: Mapping[str, Any], candidate: TokenReducer | None) -> Tensor:
        states: list[Tensor] = []
        attached = nullcontext() if candidate is None else reduce_tokens(model, candidate)
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0]))
        try:
            with attached, torch.no_grad():
                logits = model(**inputs).logits
        finally:
            hook.remove()
        return (logits if reducer.compares == "logits" else states[-1])[0, -1]

    return reducer.calibrated(answer, list(samples), family_of(model, MODELS.usable()).geometry, **settings)
