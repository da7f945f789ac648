"""One step on many tiles, between the vision encoder and the language model: those of one scope together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tokenreduce.attach.call import Call
from tokenreduce.attach.encoding import ReducedTile
from tokenreduce.attach.site import Site
from tokenreduce.attach.views import JointSight, TowerSight, shown
from tokenreduce.passage import Group, Taken, followed, scoped
from tokenreduce.reducer import Step, merge
from tokenreduce.stopwatch import part

Levels = tuple[Tensor, ...]
"""A tile's features ``(k, dim)``, and behind them what deeper layers of the tower add."""


@part("selection")
def selected(
    site: Site, call: Call, step: Step, tiles: Sequence[ReducedTile], features: Sequence[Levels]
) -> list[Levels]:
    """Run a step on these tiles, scope by scope, and note it; gives what is left of every tile's features."""
    place = {id(tile.track): number for number, tile in enumerate(tiles)}
    left = list(features)
    for row, journey in enumerate(call.journeys):
        own = [track for track in journey.tracks if id(track) in place]
        for tracks in scoped(step.scope, own):
            numbers = [place[id(track)] for track in tracks]
            group = Group(journey, tracks)
            levels = [torch.cat(level) for level in zip(*(left[number] for number in numbers), strict=True)]
            views, whole = [TowerSight(call, row, tiles[number]) for number in numbers], JointSight(call, row, tracks)
            signals, seed = shown(site, step, views, whole), partial(call.fingerprint, row, whole.numbers)
            taken = group.select(site.reducer, step, levels[0], site.family.geometry, signals, seed)
            split = [taken.split(level) for level in _followed(taken, levels)]
            for number, rows, before in zip(numbers, zip(*split, strict=True), taken.chosen, strict=True):
                left[number] = rows
                tiles[number].patches = followed(tiles[number].patches, before)
            _lasting(call, step, row, group)
        journey.note(site.label, own)
    return left


def _followed(taken: Taken, levels: Sequence[Tensor]) -> Levels:
    """What a selection leaves of every level: what deeper layers add follows the tokens, merged ones by their mean."""
    features, *deeper = levels
    rows, selection = taken.rows(features), taken.selection
    if selection.features is None:
        return rows, *(level[selection.index] for level in deeper)
    if not deeper:
        return (rows,)
    source = selection.sources(len(features)).to(features.device)
    stay = (source >= 0).nonzero()[:, 0]
    means = (merge(level[stay].float(), source[stay], len(rows)) for level in deeper)
    return rows, *(each.to(features.dtype) for each in means)


def _lasting(call: Call, step: Step, row: int, group: Group) -> None:
    """Let the order of the method last to the prompt, if it has one; of a later step without one it does not."""
    acted = torch.tensor([track.number for track in group.tracks])
    numbers, first = acted[group.order[:, 0]], 0
    for number, _ in call.rows[row]:
        picture = call.pictures[number]
        end = first + len(picture.tiles)
        if bool(((acted >= first) & (acted < end)).any()):
            own = (numbers >= first) & (numbers < end)
            order = torch.stack([numbers[own] - first, group.order[own, 1]], dim=1)
            if not step.ordered:
                picture.order = None
            elif step.scope == "tile":
                before = order[:0] if picture.order is None else picture.order
                together = torch.cat([before[before[:, 0] != acted[0] - first], order])
                picture.order = together[together[:, 0].argsort(stable=True)]
            else:
                picture.order = order
        first = end
