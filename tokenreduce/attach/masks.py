"""The attention mask of a call: the one that the model would take where the caller gives none, and what it may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tokenreduce.attach.generation import setting


def of(inputs: Mapping[str, Any], defaults: GenerationConfig, generating: bool) -> Tensor:
    """The mask ``(rows, length)`` that the model takes for a call without one: ``generate`` finds the padding by its
    token, unless that ends answers too."""
    ids = inputs["input_ids"]
    pad, end = setting("pad_token_id", inputs, defaults), setting("eos_token_id", inputs, defaults)
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    if generating and pad is not None and pad not in ends and bool((ids == pad).any()):
        return (ids != pad).to(ids.dtype)
    return torch.ones_like(ids)


def check(mask: Any) -> None:
    """Raise ``ValueError`` for a mask that says more than where the padding is."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask of shape {shape} cannot be shortened: give one of (rows, length)")
    if bool((mask != 0).all()):
        return
    begins = torch.nn.functional.pad((mask != 0).int(), (1, 0)).diff(dim=-1) == 1
    if bool((begins.sum(-1) > 1).any()):
        row = int(begins.sum(-1).argmax())
        raise ValueError(f"attention_mask hides tokens amid prompt {row}: take them out of input_ids instead")
