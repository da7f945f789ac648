"""The protocol of whatever answers prompts: transformers, a serving engine, or somebody else's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenreduce.attach import SampleReduction
from tokenreduce.budget import Budget, Solution
from tokenreduce.evaluation.costs import Cost
from tokenreduce.evaluation.prompts import Prompt
from tokenreduce.evaluation.result import FirstToken, Limits, Roofline, Timed
from tokenreduce.reducer import TokenReducer


@dataclass(frozen=True)
class Answer:
    """An answer, what the reducer did to its prompt, what its prefill cost, and its share of the batch's seconds."""

    text: str
    reduction: SampleReduction
    cost: Cost
    seconds: float


@dataclass(frozen=True)
class Times:
    """The times of one method: until the first token of an answer is there, and for every further one."""

    time_to_first_token: FirstToken
    decode_per_token: Timed


class Backend(Protocol):
    """Answers prompts, greedily: all that a run needs (:class:`tokenreduce.evaluation.runner.Runner`)."""

    @property
    def image_tokens(self) -> Sequence[str]:
        """Words that stand for images to the model, so that no question may hold them."""

    def answer(
        self, prompts: Sequence[Prompt], reducer: TokenReducer, max_new_tokens: int, *, share_vision: bool = False
    ) -> list[Answer]:
        """Answer one batch, in order. Raises whatever generating raises; the caller halves a batch without memory.

        share_vision: the same prompts come again with reducers that act after the vision tower and look at nothing
                      inside it, so that its features may be kept.
        """

    def forget(self) -> None:
        """Drop everything that is kept of prompts that may come again."""


class MeasuredBackend(Backend, Protocol):
    """A back end that a whole comparison can be made with: it is known by its hash, costed and timed."""

    def identity(self) -> dict[str, Any]:
        """Everything of the model, and of what runs it, that answers depend on: ``model``, ``processor`` and more."""

    def solve(self, reducer: TokenReducer, budget: Budget, prompts: Sequence[Prompt]) -> Solution:
        """Hold a reducer to a budget, in the mean over ``prompts`` (:func:`tokenreduce.budget.solve`)."""

    def paper_flops(self, lengths: Sequence[int]) -> float:
        """The FLOPs of a prefill by its length at every layer (:func:`tokenreduce.flops.paper_flops`)."""

    def limits(self) -> Limits:
        """Return the speeds of the machine, and what they mean for this model."""

    def roofline(self, llm_flops: float, kv_bytes: float) -> Roofline:
        """The least time that a prompt's prefill and a token after it can take."""

    def times(
        self,
        reducers: Mapping[str, Sequence[TokenReducer | None]],
        prompts: Sequence[Prompt],
        pairs: int,
        advance: Callable[[], None],
    ) -> dict[str, Times]:
        """Time every method ``pairs`` times, in turns on the same prompts.

        reducers: of each method, the first of which is the reference, the reducer for every prompt; None for the plain
                  model. ``advance`` is called after every turn.
        """

    def peak_memory(self, prompts: Sequence[Prompt], reducer: TokenReducer | None, max_new_tokens: int) -> int | None:
        """Bytes at the highest point while one batch is answered, or None where that cannot be measured."""
