"""Asking a reducer to choose; a mistake in a method must not become a wrong answer."""

from __future__ import annotations

import torch

from tokenreduce.reducer import Selection, Step, TokenReducer, VisualTokens


def checked(reducer: TokenReducer, step: Step, tokens: VisualTokens) -> Selection:
    """What the reducer selects. Raises ``ValueError`` for a selection that does not hold together."""
    selection = reducer.select(step, tokens)
    name, index = type(reducer).__name__, selection.index
    if index.dtype != torch.long or index.ndim != 1:
        raise ValueError(f"{name} selected with a {index.dtype} index of shape {tuple(index.shape)}: give (k,) long")
    if not tokens.adaptive and len(index) != tokens.keep:
        raise ValueError(f"{name} selected {len(index)} tokens where its count said {tokens.keep}")
    own = index if selection.features is None else index[index != -1]
    if len(own) and not (int(own.min()) >= 0 and int(own.max()) < len(tokens) and len(own.unique()) == len(own)):
        raise ValueError(f"{name} selected a token twice or outside 0..{len(tokens) - 1}: {index.tolist()}")
    expected = (len(index), tokens.features.shape[-1])
    if selection.features is not None and tuple(selection.features.shape) != expected:
        raise ValueError(f"{name} returned features of shape {tuple(selection.features.shape)}, not {expected}")
    if selection.source is not None and len(selection.source) != len(tokens):
        raise ValueError(f"{name} returned a source of {len(selection.source)} entries for {len(tokens)} tokens")
    return selection
