"""Behind the projector: between the vision side and the language model."""

from __future__ import annotations

from tokenreduce.attach.call import Call
from tokenreduce.attach.groups import selected
from tokenreduce.attach.site import Site
from tokenreduce.reducer import AtProjector


class ProjectorSite(Site):
    """What the projector gave is chosen from; what deeper layers of the tower add goes where its tokens go."""

    kind = AtProjector
    label = name = "projector"

    def behind_projector(self, call: Call) -> None:
        for step in self.steps:
            tiles = [tile for picture in call.pictures for tile in picture.tiles]
            left = selected(self, call, step, tiles, [tile.features for tile in tiles])
            for tile, features in zip(tiles, left, strict=True):
                tile.features = features
