"""Key-value caches that hold shortened prompts: they remember what they lost, and only those who know may go on."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tokenreduce.attach.call import Call, is_calling
from tokenreduce.attach.prompt import Prompt
from tokenreduce.models.stack import cache_of

_LOST = "_tokenreduce"
"""The attribute of a cache that holds what it lost."""


@dataclass(frozen=True)
class Lost:
    """What the layers of a cache lost.

    model:  whose cache it is; None where that is not known any more.
    prompt: the columns that the prompt lost before the language model.
    stages: what its layers lost, from one cut to the next (:class:`tokenreduce.attach.decoder.Stage`).
    rows:   how many prompts there are.
    width:  how many columns of the first layer are the prompts'; tail: how many of these, at their end, are text.
    whole:  True if nothing is lost, so that anybody may go on.
    """

    model: weakref.ref[nn.Module] | None
    prompt: Prompt | None
    stages: Sequence[Any]
    rows: int
    width: int
    tail: int
    whole: bool

    def at(self, rows: Tensor) -> Lost:
        prompt = None if self.prompt is None else self.prompt.at(rows)
        return replace(self, prompt=prompt, stages=[stage.at(rows) for stage in self.stages], rows=len(rows))

    def cropped(self, count: int) -> Lost:
        """The same without the last ``count`` columns of the prompts, which are text."""
        prompt = None if self.prompt is None else self.prompt.cropped(count)
        stages = [stage.cropped(count) for stage in self.stages]
        return replace(self, prompt=prompt, stages=stages, width=self.width - count, tail=self.tail - count)


def lost(cache: Any) -> Lost | None:
    """What a cache lost, None for a plain one."""
    return getattr(cache, _LOST, None)


def leave(call: Call, inputs: Mapping[str, Any], output: Any) -> None:
    """Leave on the cache of a forward call what its prompts lost, once a cache and turn, so that a later turn is
    understood."""
    values = output.values() if isinstance(output, Mapping) else output
    cache = next((each for each in (cache_of(inputs), *values) if isinstance(each, Cache)), None)
    if cache is None or cache is call.cache or (call.prompt is None and not call.stages):
        return
    given = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    call.cache, before, prompt, rows = cache, lost(cache), call.prompt, len(given)
    if prompt is not None and len(prompt.full) < rows:  # beams and returned sequences stand in several rows
        prompt = prompt.at(torch.arange(len(prompt.full)).repeat_interleave(rows // len(prompt.full)))
    width = cache.get_seq_length() if prompt is None else prompt.columns.shape[1]
    whole = all(each.entering == each.visual_tokens and len({*each.lengths}) == 1 for each in call.samples)
    whole = whole and (before is None or before.whole)
    stages = call.stages or (before.stages if before else ())
    whole = whole and all(stage.sight is None for stage in stages)
    if not isinstance(cache, _Shortened):
        kind: Any = type(cache)
        cache.__class__ = _shortened(kind)
    tail = _tail(call, inputs)
    setattr(cache, _LOST, Lost(weakref.ref(call.attachment.model), prompt, stages, rows, width, tail, whole))


def _tail(call: Call, inputs: Mapping[str, Any]) -> int:
    """How many columns at the end of a forward call's prompts, as the caller wrote them, are text in every row."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if call.prompt is not None:
        ids, mask = call.prompt.full, call.prompt.full_mask
    if ids is None or (mask is not None and (mask.ndim != 2 or not bool((mask[:, -1] != 0).all()))):
        return 0
    visual = call.attachment.visual(ids).any(0).flip(0)
    return int(visual.int().argmax()) if bool(visual.any()) else len(visual) - 1


class _Shortened(Cache):
    """A cache of a shortened prompt."""

    _tokenreduce: Lost

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return super().update(*args, **kwargs)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return super().get_mask_sizes(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self._tokenreduce.rows).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._tokenreduce = self._tokenreduce.at(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._tokenreduce = self._tokenreduce.at(torch.arange(self._tokenreduce.rows)[indices.cpu()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._tokenreduce = self._tokenreduce.at(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        count = next(iter((*args, *kwargs.values())))
        found, behind = self._tokenreduce, self.get_seq_length() - self._tokenreduce.width
        if count > 0 or -count > behind + found.tail:
            raise ValueError(
                f"crop({count}): this cache holds a shortened prompt, whose pictures cannot be taken back: give the "
                f"number of tokens to remove behind them, at most {behind + found.tail}, as a negative number"
            )
        super().crop(count)
        self._tokenreduce = found.cropped(max(0, -count - behind))

    def reset(self) -> None:
        """Empty the cache, which is then a plain one."""
        super().reset()
        del self._tokenreduce
        self.__class__ = type(self).__mro__[2]

    def _check(self) -> None:
        found = self._tokenreduce
        if not found.whole and not is_calling(None if found.model is None else found.model()):
            raise ValueError(
                "this key-value cache holds a prompt whose visual tokens were reduced, which only reduce_tokens on the "
                "same model can go on with: call within it, or start again without past_key_values"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    def __reduce__(self) -> Any:
        state = {**vars(self), _LOST: replace(self._tokenreduce, model=None)}
        return _restored, (type(self).__mro__[2], state)


@cache
def _shortened(kind: Any) -> type[_Shortened]:
    return type(f"Shortened{kind.__name__}", (_Shortened, kind), {})


def _restored(kind: Any, state: dict[str, Any]) -> Any:
    shortened: Any = _shortened(kind)
    cache = object.__new__(shortened)
    for name, value in state.items():
        setattr(cache, name, value)
    return cache
