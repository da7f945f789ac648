"""Equal budgets: the setting at which a reducer costs what it shall cost, found on its counts alone.

A budget is in one of three currencies: visual tokens that enter the language model, their mean over the inputs of its
layers, or the FLOPs of its prefill. :mod:`tokenreduce.counts` knows all three before any embedding exists, so that
nothing has to be run; where a method decides by what it sees, they are measured instead. What was really spent is in
the records, and is what tables show.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import fmean
from typing import Literal, get_args

from transformers import PretrainedConfig

from tokenreduce.counts import AdaptiveError, Layout, entering, layer_counts
from tokenreduce.flops import decoder_flops
from tokenreduce.reducer import Geometry, Keep, TokenReducer, check_keep

Currency = Literal["tokens", "layer_mean", "flops"]

RESOLUTION = 10**6
"""Ratios are solved to so many parts."""

MEASURED_RESOLUTION = 10**3
"""Likewise where the model is run for every try."""

Measure = Callable[[TokenReducer], Sequence[Sequence[int]]]
"""Runs a reducer: for every prompt how many visual tokens each layer of the language model took in."""

_ROUNDING = 1 + 1e-9
"""A budget is not missed by the last digits of a float."""


@dataclass(frozen=True)
class Budget:
    """What a reducer shall cost.

    value: a share of the unreduced model's figure in (0, 1] when a float, a number of tokens when an int.
    """

    currency: Currency
    value: Keep

    def __post_init__(self) -> None:
        if self.currency not in get_args(Currency):
            raise ValueError(f"budget={self.currency} is no currency: choose one of {', '.join(get_args(Currency))}")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise ValueError(f"budget.value={self.value!r} is not a number: give a ratio in (0, 1], or a whole number")
        if self.currency == "flops" and isinstance(self.value, int):
            raise ValueError(f"budget.value={self.value}: a budget of FLOPs is a ratio in (0, 1], such as 0.25")
        try:
            check_keep(self.value)
        except ValueError as error:
            raise ValueError(f"budget.value: {error}") from error


@dataclass(frozen=True)
class Solution:
    """A reducer that meets ``budget``.

    asked, expected: the budget, and what the reducer costs on the layouts that it was solved for.
    least, most:     what it could cost.
    whole:           what the unreduced model costs.
    """

    reducer: TokenReducer
    budget: Budget
    asked: float
    expected: float
    least: float
    most: float
    whole: float


def solve(
    reducer: TokenReducer,
    budget: Budget,
    geometry: Geometry,
    layouts: Sequence[Layout],
    decoder: PretrainedConfig,
    measure: Measure | None = None,
) -> Solution:
    """Set the reducer's own knob (:meth:`TokenReducer.with_keep`) so that it costs ``budget``, or as near to it as the
    knob comes: at most half a step off, and less of two equally near.

    Costs are means over ``layouts``. Where every one of them is a single tile and the budget is a number of tokens, the
    knob becomes a number too; otherwise a ratio, the shortest one that costs this much, which then means something
    for pictures of other sizes. ``decoder`` is the configuration of the language model.

    The counts of an adaptive method nobody knows in advance; ``measure`` runs it on the prompts of the layouts instead.

    Raises ``ValueError`` for a budget out of reach, with the range that is within, and for a reducer that has no knob;
    ``AdaptiveError`` for an adaptive one that is not measured.
    """
    name = type(reducer).__name__
    resolution = RESOLUTION

    def counted(candidate: TokenReducer) -> float:
        return _mean(candidate, budget.currency, geometry, layouts, decoder)

    def measured(candidate: TokenReducer) -> float:
        if measure is None:
            raise ValueError("nothing measures this reducer")
        pairs = zip(layouts, measure(candidate), strict=True)
        return fmean(_cost(budget.currency, layout, counts, decoder) for layout, counts in pairs)

    spends = counted
    if measure is not None:
        try:
            counted(reducer)
        except AdaptiveError:
            spends, resolution = measured, MEASURED_RESOLUTION

    @lru_cache(maxsize=None, typed=True)  # 1 is one token, 1.0 is all of them
    def cost(setting: Keep) -> float:
        return spends(reducer.with_keep(setting))

    def cost_if_allowed(setting: Keep) -> float:
        """A method may need a least number of tokens; below that nothing is allowed."""
        try:
            return cost(setting)
        except AdaptiveError:
            raise
        except ValueError:
            return -1.0

    whole = _mean(None, budget.currency, geometry, layouts, decoder)
    asked = float(budget.value) if isinstance(budget.value, int) else budget.value * whole
    describe = partial(_described, budget.currency, whole)
    try:
        reducer.with_keep(1.0)
    except TypeError as error:
        always = describe(spends(reducer))
        raise ValueError(f"{error}, so it meets no budget: it costs {always}") from error

    most = cost(1.0)
    counting = _counts(reducer, budget, layouts)
    places = range(1, (max(len(layout.tiles[0].grid) for layout in layouts) if counting else resolution) + 1)

    def setting(place: int) -> Keep:
        return place if counting else place / resolution

    def by_place(place: int) -> float:
        return cost_if_allowed(setting(place))

    least = cost(setting(places[bisect_left(places, 0.0, key=by_place)]))
    if not least <= asked * _ROUNDING or not asked <= most * _ROUNDING:
        reach = f"it can cost {least:.4g} to {most:.4g}, {least / whole:.3g} to {most / whole:.3g} of the whole"
        if least == most:
            inside = all(step.decoder_layer(geometry) is not None for step in reducer.steps(geometry))
            hint = "; it drops tokens inside the language model, so use budget=layer_mean" if inside else ""
            reach = f"it always costs {describe(most)}{hint}"
        raise ValueError(f"{name} cannot cost {describe(asked)}: on this model {reach}")
    above = bisect_right(places, asked * _ROUNDING, key=by_place)
    found = min(map(setting, places[above - 1 : above + 1]), key=lambda near: abs(cost(near) - asked))
    if not counting:
        # The share that was asked for, if it does as well: it is what one would write by hand.
        plain = [budget.value] if isinstance(budget.value, float) else []
        found = next(each for each in (*plain, *_shorter(found)) if cost_if_allowed(each) == cost(found))
    return Solution(reducer.with_keep(found), budget, asked, cost(found), least, most, whole)


def _mean(
    reducer: TokenReducer | None,
    currency: Currency,
    geometry: Geometry,
    layouts: Sequence[Layout],
    decoder: PretrainedConfig,
) -> float:
    """What a reducer costs on average over the layouts; the unreduced model where it is None."""

    def counts(layout: Layout) -> Sequence[int]:
        if reducer is None:
            return (layout.visual,) * geometry.decoder_layers
        # A method that is adaptive inside the language model may well say how many enter it.
        return (
            [entering(reducer, geometry, layout)] if currency == "tokens" else layer_counts(reducer, geometry, layout)
        )

    return fmean(_cost(currency, layout, counts(layout), decoder) for layout in layouts)


def _cost(currency: Currency, layout: Layout, counts: Sequence[int], decoder: PretrainedConfig) -> float:
    """What a prompt of this layout costs whose layers take in so many visual tokens."""
    match currency:
        case "tokens":
            return float(counts[0])
        case "layer_mean":
            return fmean(counts)
        case "flops":
            return decoder_flops([layout.text + count for count in counts], decoder)


def _counts(reducer: TokenReducer, budget: Budget, layouts: Sequence[Layout]) -> bool:
    """Whether the knob becomes a number of tokens, and not a ratio."""
    if isinstance(budget.value, float) or any(len(layout.tiles) != 1 for layout in layouts):
        return False
    try:
        reducer.with_keep(1)
    except TypeError:  # a method that only knows ratios
        return False
    return True


def _shorter(ratio: float) -> Iterator[float]:
    """Ratios near ``ratio`` with fewer digits, the fewest first, and in the end itself."""
    for scale in (10**digits for digits in range(1, len(str(RESOLUTION)) - 1)):
        lower = math.floor(ratio * scale)
        yield from (each / scale for each in (lower, lower + 1) if 0 < each <= scale)
    yield ratio


def _described(currency: Currency, whole: float, figure: float) -> str:
    match currency:
        case "tokens":
            text = f"{figure:.4g} visual tokens entering the language model"
        case "layer_mean":
            text = f"a layer mean of {figure:.4g} visual tokens"
        case "flops":
            text = f"{figure:.3g} FLOPs of prefill"
    return f"{text} ({figure / whole:.3g} of the unreduced model's)"
