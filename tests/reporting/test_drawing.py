"""Names beside a figure's lines move as little as it takes to be read."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tokenreduce.reporting.drawing import apart, pareto


def test_names_that_have_room_stay_and_others_share_what_is_missing() -> None:
    assert apart([10, 5, 1], 0.5) == [10, 5, 1]
    assert apart([10, 9.9, 9.8, 5, 1, 0.9], 0.5) == pytest.approx([10.4, 9.9, 9.4, 5, 1.2, 0.7])
    crowded = apart([3, 3, 3, 2.9, 2.5, 0], 1)
    assert all(one - other >= 1 - 1e-9 for one, other in pairwise(crowded))
    assert apart([], 1) == []


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [(0.5, 0.9), (0.25, 0.8), (0.25, 0.7), (0.3, 0.75), (0.1, 0.2), (0.6, 0.9)]
    assert pareto(points) == [(0.5, 90), (0.25, 80), (0.1, 20)]
