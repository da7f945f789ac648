"""Before the vision tower: the picture itself is made smaller, or taken away."""

from __future__ import annotations

from typing import Any

import torch

from tokenreduce.attach.call import Call
from tokenreduce.attach.site import Site
from tokenreduce.counts import promised
from tokenreduce.models.family import Inputs, ModelFamily
from tokenreduce.passage import Group
from tokenreduce.reducer import AtInput, Grid, Selection, Span, Tile


class InputSite(Site):
    """Every picture becomes the grid of tokens that the method's count allows, or nothing."""

    kind = AtInput
    label = name = "input"

    @classmethod
    def refusal(cls, step: Any, family: ModelFamily) -> str | None:
        return "a picture is made smaller tile by tile" if step.scope != "tile" else super().refusal(step, family)

    def before_tower(self, call: Call, inputs: Inputs) -> Inputs:
        for step in self.steps:
            inputs = self._resized(call, step, inputs)
        return inputs

    def _resized(self, call: Call, step: AtInput, inputs: Inputs) -> Inputs:
        """Make every picture smaller, or take all of them away."""
        name = type(self.reducer).__name__
        tiles = [tile for picture in call.pictures for tile in picture.tiles]
        targets: list[Grid | None] = []
        for tile in tiles:
            grid = tile.track.tile.grid
            count = promised(self.reducer, step, Span(self.family.geometry, (tile.track.tile,), len(grid), len(grid)))
            if not isinstance(count, int):
                raise ValueError(f"{name}: a step at the input must say how many tokens it leaves")
            targets.append(grid.fit(count) if count else None)
        grids = [target for target in targets if target is not None]
        if len(grids) not in (0, len(tiles)):
            raise ValueError(f"{name} takes away some pictures of a call and keeps others, which is not supported")
        for tile, target in zip(tiles, targets, strict=True):
            grid = tile.track.tile.grid
            nothing = torch.arange(0), torch.full((len(grid),), -1)
            index, source = nothing if target is None else grid.cells(target)
            Group(tile.journey, [tile.track]).take(step, Selection(index, source=source))
            if target is not None:
                tile.track.resized(target)
            tile.encoded = tile.held = len(index)
            tile.patches = torch.arange(len(index))
        for journey in call.journeys:
            journey.note(self.label)
        return {**inputs, **self.family.resize(inputs, grids)} if grids else inputs


def takes_pictures_away(reducer: Any, step: Any, family: ModelFamily) -> bool:
    """True if nothing is left behind this step, which every model can host."""
    one = Grid(1, 1)
    return step.resizes and reducer.count(step, Span(family.geometry, (Tile(one),), 1, 1)) == 0
