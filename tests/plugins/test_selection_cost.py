"""What selecting costs, of every registered reducer: no waiting for a device, and at most one matrix of all pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenreduce import available
from tokenreduce.reducer import Geometry, Grid, TokenReducer
from tokenreduce.testing import MadeUp

from .watching import Watching

SHALLOW = Geometry(encoder_layers=6, decoder_layers=8, feature_layer=4, class_token=True)

REDUCERS = [name for name in available("reducers") if name != "chain"]


def keeping(reducer: TokenReducer, ratio: float) -> TokenReducer:
    """The reducer with this knob, or as it is where it has none."""
    try:
        return reducer.with_keep(ratio)
    except TypeError:
        return reducer


def watched(reducer: TokenReducer, grid: Grid) -> tuple[Watching, int]:
    """What running a reducer takes, and in how many steps it selects."""
    watching = Watching()
    selections = MadeUp(grid, dim=64, heads=4, text=16, geometry=SHALLOW).run(reducer, lambda: watching)
    return watching, sum(1 for _ in selections)


@pytest.mark.parametrize("name", REDUCERS)
def test_the_processor_waits_no_more_often_where_more_tokens_are_kept(
    made: Callable[[str], TokenReducer], name: str
) -> None:
    (few, steps), (many, _) = (watched(keeping(made(name), kept / 576), Grid(24, 24)) for kept in (64, 256))
    assert many.copies <= few.copies + steps, "a step that had nothing to do may have something"
    assert many.waits <= few.waits + 4 * steps


@pytest.mark.parametrize("name", REDUCERS)
def test_at_most_one_matrix_of_all_pairs_of_tokens_is_held(made: Callable[[str], TokenReducer], name: str) -> None:
    watching, _ = watched(keeping(made(name), 1 / 32), Grid(48, 64))
    matrix = 4 * 3072**2
    assert watching.peak <= 1.5 * matrix
