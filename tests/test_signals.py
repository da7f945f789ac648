"""The attention view shows what the layer computes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tokenreduce.signals import Attention


def _view(key_heads: int, mask: Tensor | None) -> tuple[Attention, Tensor]:
    """A view on random tensors, and the probabilities computed the plain way."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 7, 8, generator=generator)
    keys, values = (torch.randn(key_heads, 7, 8, generator=generator) for _ in range(2))
    logits = queries @ keys.repeat_interleave(4 // key_heads, 0).transpose(1, 2) * 0.3
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return Attention(queries, keys, values, 0.3, slice(1, None), 0, mask), logits.softmax(-1)


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, CAUSAL, torch.where(CAUSAL, 0.0, -1e9)], ids=["none", "bool", "additive"])
def test_rows_and_means_are_those_of_the_full_map(key_heads: int, mask: Tensor | None) -> None:
    view, full = _view(key_heads, mask)
    torch.testing.assert_close(view.rows(slice(None)), full)
    torch.testing.assert_close(view.rows(-1), full[:, -1:])
    torch.testing.assert_close(view.rows(torch.tensor([4, 2])), full[:, [4, 2]])
    torch.testing.assert_close(view.mean(), full.mean(0)[1:, 1:])
    torch.testing.assert_close(view.mean(slice(None), slice(None)), full.mean(0))
    torch.testing.assert_close(view.mean(0, slice(1, None)), full.mean(0)[:1, 1:])


def test_attention_received_is_the_class_tokens_or_that_of_all() -> None:
    view, full = _view(2, None)
    torch.testing.assert_close(view.received(), full.mean(0)[0, 1:])
    torch.testing.assert_close(replace(view, class_token=None).received(), full.mean((0, 1))[1:])


def test_scores_order_as_probabilities_do() -> None:
    view, full = _view(2, None)
    order = full[0, 3].argsort()
    scores = view.scores(3)[0, 0][order]
    assert all(low <= high for low, high in pairwise(scores.tolist()))


@pytest.mark.parametrize("visual", [slice(1, None), torch.arange(1, 2099).view(-1, 2)], ids=["tokens", "groups"])
def test_marginals_of_a_long_sequence_are_those_of_the_full_map(visual: slice | Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (2 * torch.randn(2, 2100, 8, generator=generator) for _ in range(2))
    view = Attention(queries, keys, keys, 0.3, visual, 0)
    full = view.mean()
    received, given = view.marginals()
    torch.testing.assert_close(received, full.mean(dim=0))
    torch.testing.assert_close(given, full.mean(dim=1))
    torch.testing.assert_close(view.received(slice(None)), view.mean(slice(None)).mean(dim=0))
    torch.testing.assert_close(view.received(torch.tensor([4, 2])), view.mean(torch.tensor([4, 2])).mean(dim=0))
    torch.testing.assert_close(view.received(), view.mean(0)[0])
