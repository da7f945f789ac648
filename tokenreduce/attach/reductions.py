"""What was done to the visual tokens of a call: what an attachment, and a record, tell about it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from tokenreduce.attach.decoder import Prefill
from tokenreduce.reducer import Grid

Role = Literal["whole", "thumbnail", "crop", "frame"]
"""What a tile shows: a picture in the only view of it, all of one that is shown in crops as well, one of these crops,
or a frame of a video."""


@dataclass(frozen=True)
class StepReduction:
    """What one step did to one tile.

    index:  the tokens that stay, in the tile's own numbering; -1 for a row that stands for none (a class token).
    source: for each of the tile's tokens the row it went into, -1 for a dropped one.
    merged: True if rows are other than the tokens at ``index``.
    into:   for each of the tile's tokens the tile whose row it went into, counted over the sample's images; empty where
            every token's row is in its own tile.
    """

    site: str
    index: tuple[int, ...]
    source: tuple[int, ...]
    merged: bool = False
    into: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageReduction:
    """What a reducer did to one tile: an image, a tile of one where the model cuts images up, or a frame.

    encoded: how many patches the vision encoder saw in its place.
    picture: the place of its picture, or video, among the prompt's.
    time:    of a frame, in seconds from the video's start, where it is known.
    """

    grid: Grid
    steps: tuple[StepReduction, ...] = ()
    encoded: int = 0
    role: Role = "whole"
    picture: int = 0
    time: float | None = None

    @property
    def part(self) -> bool:
        """True if it shows a part of its picture alone."""
        return self.role == "crop"

    @property
    def kept(self) -> Sequence[int]:
        """The tokens that stay after the last step."""
        return self.steps[-1].index if self.steps else range(len(self.grid))


@dataclass(frozen=True)
class SampleReduction:
    """What a reducer did to one prompt.

    visual_tokens: how many there were; entering: how many enter the language model;
    lengths: the prompt's length, text included, at the input of every decoder layer.
    """

    images: tuple[ImageReduction, ...]
    visual_tokens: int
    entering: int
    lengths: tuple[int, ...]


def with_decoder_steps(
    sample: SampleReduction, entries: Tensor, prefill: Prefill, row: int, layers: int
) -> SampleReduction:
    """Add to a sample's record what was cut inside the language model, and the lengths that its layers saw.

    ``entries`` tells for every visual token that entered, ``(entering, 2)``, its tile and its row in that.
    """
    images = []
    for number, image in enumerate(sample.images):
        kept, before = image.kept, (image.steps[-1].source if image.steps else range(len(image.grid)))
        own = (entries[:, 0] == number).nonzero()[:, 0]
        entered = dict(zip(entries[own, 1].tolist(), own.tolist(), strict=True))
        tokens = {place: kept[entry] for entry, place in entered.items()}
        steps = list(image.steps)
        for layer, index, source, merged in prefill.rows[row].steps:
            inside = tuple(tokens[place] for place in index.tolist() if place in tokens)
            into = tuple(-1 if old < 0 else int(source[entered[old]]) for old in before)
            steps.append(StepReduction(f"decoder layer {layer}", inside, into, merged))
        images.append(replace(image, steps=tuple(steps)))
    full = int(prefill.valid[row].sum())
    stages = [prefill.stage(layer) for layer in range(layers)]
    lengths = tuple(full if stage is None else int(stage.valid[row].sum()) for stage in stages)
    return replace(sample, images=tuple(images), lengths=lengths)
