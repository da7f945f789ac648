"""Equal budgets: the setting at which a reducer costs what it shall cost, found on its counts alone.

A budget is in one of three currencies: visual tokens that enter the language model, their mean over the inputs of its
layers, or the FLOPs of its prefill. :meth:`TokenReducer.count` tells all three before any embedding exists, so that
nothing has to be run. What was really spent is in the records, and is what tables show.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, get_args

from transformers import PretrainedConfig

from tokenreduce.flops import decoder_flops
from tokenreduce.reducer import (
    AtDecoder,
    AtInput,
    Geometry,
    Grid,
    Keep,
    Span,
    Step,
    TokenReducer,
    check_keep,
    layer_index,
)

Currency = Literal["tokens", "layer_mean", "flops"]

RESOLUTION = 10**6
"""Ratios are solved to so many parts."""

_ROUNDING = 1 + 1e-9
"""A budget is not missed by the last digits of a float."""


class AdaptiveError(ValueError):
    """The reducer decides by what it sees how many tokens it keeps, so no count is known before a model has run."""


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
class Layout:
    """A prompt as it is before anything is computed.

    grids:   the tiles of its pictures, as they enter.
    special: how many tokens besides stand at its placeholders, such as newlines. All of them count as long as any
             visual token is left, though some families drop theirs line by line.
    text:    how many other tokens it has.
    """

    grids: tuple[Grid, ...]
    special: int = 0
    text: int = 0

    @property
    def visual(self) -> int:
        return sum(map(len, self.grids)) + self.special


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
    reducer: TokenReducer, budget: Budget, geometry: Geometry, layouts: Sequence[Layout], decoder: PretrainedConfig
) -> Solution:
    """Set the reducer's own knob (:meth:`TokenReducer.with_keep`) so that it costs ``budget``, or as near to it as the
    knob comes: at most half a step off, and less of two equally near.

    Costs are means over ``layouts``. Where every one of them is a single tile and the budget is a number of tokens, the
    knob becomes a number too; otherwise a ratio, the shortest one that costs this much, which then means something
    for pictures of other sizes. ``decoder`` is the configuration of the language model.

    Raises ``ValueError`` for a budget out of reach, with the range that is within, and for a reducer that has no knob;
    ``AdaptiveError`` for one whose counts nobody knows in advance.
    """
    name = type(reducer).__name__

    @lru_cache(maxsize=None, typed=True)  # 1 is one token, 1.0 is all of them
    def cost(setting: Keep) -> float:
        return _mean(reducer.with_keep(setting), budget.currency, geometry, layouts, decoder)

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
        always = describe(_mean(reducer, budget.currency, geometry, layouts, decoder))
        raise ValueError(f"{error}, so it meets no budget: it costs {always}") from error

    most = cost(1.0)
    counting = _counts(reducer, budget, layouts)
    places = range(1, (max(len(layout.grids[0]) for layout in layouts) if counting else RESOLUTION) + 1)

    def setting(place: int) -> Keep:
        return place if counting else place / RESOLUTION

    def by_place(place: int) -> float:
        return cost_if_allowed(setting(place))

    least = cost(setting(places[bisect_left(places, 0.0, key=by_place)]))
    if not least <= asked * _ROUNDING or not asked <= most * _ROUNDING:
        reach = f"it can cost {least:.4g} to {most:.4g}, {least / whole:.3g} to {most / whole:.3g} of the whole"
        if least == most:
            inside = all(isinstance(step, AtDecoder) for step in reducer.steps(geometry))
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


def layer_counts(reducer: TokenReducer, geometry: Geometry, layout: Layout) -> tuple[int, ...]:
    """How many visual tokens every layer of the language model takes in, ``(decoder layers,)``.

    Raises ``AdaptiveError`` where that is known only after a model has run.
    """
    steps = reducer.steps(geometry)
    before = [step for step in steps if not isinstance(step, AtDecoder)]
    entering = sum(_left(reducer, before, geometry, grid) for grid in layout.grids)
    entering += layout.special if entering else 0
    inside: dict[int, list[AtDecoder]] = {}
    for step in steps:
        if isinstance(step, AtDecoder):
            inside.setdefault(layer_index(step.layer, geometry.decoder_layers), []).append(step)
    if 0 in inside:
        raise ValueError(f"{type(reducer).__name__} would drop tokens before decoder layer 0")
    counts, current = [], entering
    for layer in range(geometry.decoder_layers):
        for step in inside.get(layer, ()):
            if current:
                count = reducer.count(step, Span(geometry, layout.grids, entering, current))
                if count is None:
                    raise _adaptive(reducer)
                current = count
        counts.append(current)
    return tuple(counts)


def _left(reducer: TokenReducer, steps: Sequence[Step], geometry: Geometry, grid: Grid) -> int:
    """How many tokens of one tile enter the language model."""
    encoded, current, known = grid, len(grid), True
    for step in steps:
        if not current:
            break
        count = reducer.count(step, Span(geometry, (encoded,), len(encoded), current))
        if isinstance(step, AtInput) and count:
            encoded = encoded.fit(count)
            count = len(encoded)
        # An adaptive step between others does no harm where a later one says how many it leaves in the end.
        known = count is not None and (known or count != current)
        current = current if count is None else count
    if not known:
        raise _adaptive(reducer)
    return current


def _adaptive(reducer: TokenReducer) -> AdaptiveError:
    return AdaptiveError(
        f"{type(reducer).__name__} decides by the picture how many tokens it keeps, so it cannot be held to a budget"
    )


def _mean(
    reducer: TokenReducer | None,
    currency: Currency,
    geometry: Geometry,
    layouts: Sequence[Layout],
    decoder: PretrainedConfig,
) -> float:
    """What a reducer costs on average over the layouts; the unreduced model where it is None."""
    costs = []
    for layout in layouts:
        unreduced = (layout.visual,) * geometry.decoder_layers
        counts = unreduced if reducer is None else layer_counts(reducer, geometry, layout)
        match currency:
            case "tokens":
                costs.append(float(counts[0]))
            case "layer_mean":
                costs.append(sum(counts) / len(counts))
            case "flops":
                costs.append(decoder_flops([layout.text + count for count in counts], decoder))
    return sum(costs) / len(costs)


def _counts(reducer: TokenReducer, budget: Budget, layouts: Sequence[Layout]) -> bool:
    """Whether the knob becomes a number of tokens, and not a ratio."""
    if isinstance(budget.value, float) or any(len(layout.grids) != 1 for layout in layouts):
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
