"""What was done to the visual tokens of a call, as it is told to whoever asks afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tokenreduce.attach.decoder import Prefill
from tokenreduce.reducer import Grid


@dataclass(frozen=True)
class StepReduction:
    """What one step did to one image.

    index:  the tokens that stay, in the image's own numbering; -1 for a row that stands for none (a class token).
    source: for each of the image's tokens the row it went into, -1 for a dropped one.
    merged: whether rows are other than the tokens at ``index``.
    """

    site: str
    index: tuple[int, ...]
    source: tuple[int, ...]
    merged: bool


@dataclass(frozen=True)
class ImageReduction:
    """What a reducer did to one tile: an image, a tile of one where the model cuts images up, or a frame.

    encoded: how many patches the vision encoder saw in its place; part: whether it shows a part of its picture alone.
    """

    grid: Grid
    steps: tuple[StepReduction, ...]
    encoded: int
    part: bool = False

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
