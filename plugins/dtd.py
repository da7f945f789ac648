"""Of a video, keep what changed since the frame before: DTD of TimeChat-Online (arXiv 2504.17343) by a threshold, and
EVS (arXiv 2510.14624), as vLLM has it, by a count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from tokenreduce.reducer import (
    AtProjector,
    Count,
    Geometry,
    Keep,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.signals import Signal, View, Watch


@dataclass(frozen=True)
class PixelChange(Signal):
    """How much every place of a video's frames changed since the frame before, on average over its pixels and colours:
    ``(frames, places)``, where 1 is from black to white; 0 in the first frame.

    Of frames that the vision tower takes several at a time, the first of those before and the last of those there are
    now are compared, as in the official code.
    """

    joint: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.processor()

    def value(self, view: View) -> Tensor:
        scene = view.scene
        (pixels,), grid = scene.pixels, scene.tiles[0].grid
        colours = pixels.new_tensor(scene.processor.image_processor.image_std, dtype=torch.float32)
        if pixels.ndim == 4:
            change = (pixels[1:].float() - pixels[:-1].float()).abs() * colours[:, None, None]
            change = adaptive_avg_pool2d(change.mean(dim=1), (grid.height, grid.width)).flatten(1)
        else:
            vision = scene.family.model.config.vision_config
            change = patch_change(pixels.float(), len(scene.tiles), len(grid), vision.temporal_patch_size, colours)
        return torch.cat([change.new_zeros(1, len(grid)), change])


def patch_change(pixels: Tensor, frames: int, places: int, depth: int, colours: Tensor) -> Tensor:
    """How much every place of a video changed since the frame before: ``(frames - 1, places)``.

    pixels:  ``(patches, values)`` as Qwen's processors make them: patches of a place lie together, and a patch is of
             ``depth`` moments of every colour.
    colours: the standard deviations that the processor divided by, ``(colours,)``.
    """
    patches = pixels.view(frames, places, -1, len(colours), depth, pixels.shape[1] // (len(colours) * depth))
    change = (patches[1:, ..., -1, :] - patches[:-1, ..., 0, :]).abs()
    return (change * colours[:, None]).mean(dim=(2, 3, 4))


@dataclass(frozen=True)
class Dtd(TokenReducer):
    """Of a video, keep the first frame, and of the others what differs from the same place one frame earlier.

    method:    ``feature`` to compare tokens by cosine, ``pixel`` to compare what they show.
    threshold: tokens with a higher cosine, or whose pixels changed by less on average, black to white being 1, go.
               Published are 0.5 and 0.25 for features, and 0.1, 0.05 and 0.01 for pixels.
    absolute:  True for that; how many stay depends on the video, and of a frame that may be none. False to drop
               ``threshold`` as a share of every frame but the first, rounded down: the tokens that changed least.

    The frame before is the original one, whatever was dropped of it. A video is compared within itself alone, where the
    official code goes on into the next, and an image stays whole. Cosines are in float32, whatever the model's type.
    Pixels need the model's processor, whose normalisation is undone; the official code takes CLIP's for granted. For a
    fixed count there is evs. Presets: dtd_feature_050, dtd_feature_025, dtd_pixel_010, dtd_pixel_005 and dtd_pixel_001.
    """

    paper = "2504.17343"
    parity = "official vectors, 5 cases"

    positions: Positions = field(default="original", kw_only=True)
    method: Literal["feature", "pixel"] = "feature"
    threshold: float = 0.5
    absolute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.absolute and not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} is no share of a frame, which absolute=False makes it: 0 to 1"
            )

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(scope="picture", sees=(PixelChange(),) if self.method == "pixel" else ())]

    def count(self, step: Step, span: Span) -> Count:
        first, *others = [len(grid) for grid in span.grids]
        if still(span):
            return span.current
        if span.current < first + sum(others):
            return 0, span.current  # an earlier method cut, nobody knows where
        if self.absolute:
            return first, span.current
        return first + sum(size - int(size * self.threshold) for size in others)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if still(tokens.span):
            return tokens.everything()
        before = earlier(tokens)
        if self.method == "pixel":
            alike, limit = -tokens[PixelChange()][tokens.tile, tokens.place], -self.threshold
        else:
            alike, limit = likeness(tokens.features, before), self.threshold
        if self.absolute:
            return Selection(((before < 0) | ~(alike > limit)).nonzero()[:, 0])
        sizes = tokens.tile.bincount(minlength=len(tokens.span.tiles))
        rank = ranks(-alike.masked_fill(before < 0, -torch.inf), tokens.tile, sizes)
        kept = (tokens.tile == 0) | (rank >= (sizes.double() * self.threshold).long()[tokens.tile])
        return Selection(kept.nonzero()[:, 0])


@dataclass(frozen=True)
class Evs(TokenReducer):
    """Of a video, keep the first frame and the tokens that are least like the same place one frame earlier.

    keep: the share of the video's tokens that stay, rounded down, but never less than the first frame, which is whole
          and counts. Of a later frame all may go. vLLM's ``video_pruning_rate`` q is ``keep=1 - q``, binary error
          included.

    The paper compares pixels; vLLM, and so this, the tokens that enter the language model, by cosine, here in float32
    whatever the model's type. The frame before is the original one. Images stay whole. Survivors keep their positions
    in time and space, and the text behind them too, as in vLLM's Qwen3-VL. In its Qwen2.5-VL the text follows a picture
    or video by the width of its grid, where here, as in transformers, by the longer side. Preset: evs_r25.
    """

    paper = "2510.14624"
    parity = "official vectors, 5 cases"

    positions: Positions = field(default="original", kw_only=True)
    keep: Keep = 0.25

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(scope="picture")]

    def count(self, step: Step, span: Span) -> int:
        if still(span):
            return span.current
        wanted = self.keep if isinstance(self.keep, int) else int(span.current * self.keep)
        return min(span.current, max(len(span.grids[0]), wanted))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if still(tokens.span):
            return tokens.everything()
        before = earlier(tokens)
        change = 1 - likeness(tokens.features, before)
        return Selection(tokens.best(change.masked_fill(before < 0, 255)))  # as vLLM has it; a real one is at most 2


def likeness(features: Tensor, before: Tensor) -> Tensor:
    """The cosine of every token (tokens, dim) and that at ``before`` (tokens,): ``(tokens,)``, any number at a -1."""
    features = features.float()
    return cosine_similarity(features, features[before], dim=-1)


def still(span: Span) -> bool:
    """True of an image, also of one that is cut up, and of a video of one frame."""
    return len(span.tiles) < 2 or span.cut_up


def earlier(tokens: VisualTokens) -> Tensor:
    """Where the token stands that has the same place one frame earlier, -1 if there is none: ``(tokens,)``."""
    rows = tokens.tile.new_full((len(tokens.span.tiles) + 1, max(map(len, tokens.span.grids))), -1)
    rows[tokens.tile + 1, tokens.place] = torch.arange(len(tokens), device=rows.device)
    return rows[tokens.tile, tokens.place]


def ranks(scores: Tensor, frame: Tensor, sizes: Tensor) -> Tensor:
    """Which place every token has in its frame by ascending score, from 0, ties by order: ``(tokens,)``.

    ``frame`` (tokens,) says which frame each is of, and ``sizes`` (frames,) how many tokens that has.
    """
    order = scores.argsort(stable=True)
    order = order[frame[order].argsort(stable=True)]
    starts = sizes.cumsum(0) - sizes
    return torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device) - starts[frame[order]]
    )
