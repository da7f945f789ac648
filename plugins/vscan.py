"""VScan (arXiv 2505.22654): a local and a global look at the picture, and a later one from the prompt's end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
    Geometry,
    Grid,
    Keep,
    Layer,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    blocks,
    merge,
    tokens_to_keep,
)
from tokenreduce.signals import EncoderAttention, LookAheadAttention


@dataclass(frozen=True)
class VScan(TokenReducer):
    """Keep the best of every window and the best of the rest, merge the others into them, and drop more at mid-depth.

    keep:         how many tokens of a tile stay: half of them, rounded down, local and the others global.
    window:       the side of a window in tokens; left-over rows and columns belong to the last ones.
    share:        ``equal``: every window gives as many local tokens, rounded down, so that there may be fewer than
                  ``keep`` (100 of 576 leave 98). ``capped``: the best go first until the local half is full, of a
                  window at most its share rounded up.
    local_layer, global_layer: the encoder layers whose attention says which tokens are best: the class token's, or
                  without one that of all tokens.
    layers:       how many layers of the language model have run before each later cut.
    keeps:        what each of these leaves, by what the prompt's last token is about to attend to: a number, or a ratio
                  of the tokens still there.
    rotated:      False if that attention has no rotary embedding, as in the authors' code for Qwen2.5-VL.

    Every dropped token goes to the kept one of largest cosine, which becomes the mean. A local token is never picked
    again, where the official code sets its score to 0 and may. Presets: vscan_64 for LLaVA-1.5; vscan_qwen and
    vscan_qwen_refcoco for Qwen2.5-VL, where survivors keep their positions.
    """

    paper = "2505.22654"
    parity = "official vectors, 8 cases; the later cuts are PyramidDrop's"
    merges = True

    keep: Keep = 96 / 576
    window: int = 6
    share: Literal["equal", "capped"] = "equal"
    local_layer: Layer = 5 / 24
    global_layer: Layer = -2
    layers: tuple[Layer, ...] = (0.5,)
    keeps: tuple[Keep, ...] = (1 / 3,)
    rotated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != len(self.keeps):
            raise ValueError(f"layers={self.layers} and keeps={self.keeps}: give one number or ratio for every layer")
        if self.window < 1:
            raise ValueError(f"window={self.window}: a window has at least one token a side")

    def steps(self, geometry: Geometry) -> list[Step]:
        sees = EncoderAttention(self.local_layer), EncoderAttention(self.global_layer)
        return [
            AtProjector(keep=self.keep, sees=sees),
            *(
                AtDecoder(layer=layer, keep=keep, stage=stage, sees=(LookAheadAttention(self.rotated),))
                for stage, (layer, keep) in enumerate(zip(self.layers, self.keeps, strict=True), start=1)
            ),
        ]

    def count(self, step: Step, span: Span) -> int:
        if step.stage:
            return tokens_to_keep(self.keeps[step.stage - 1], span.current)
        kept = span.keep(self.keep)
        return kept if kept == span.entered else self.locals(span.grid, kept)[1] + kept - kept // 2

    def locals(self, grid: Grid, kept: int) -> tuple[int, int]:
        """How many local tokens a window gives at most, and how many there are in all."""
        windows, half = math.prod(self.windows(grid)), kept // 2
        return (half // windows, half // windows * windows) if self.share == "equal" else (-(-half // windows), half)

    def windows(self, grid: Grid) -> tuple[int, int]:
        """How many windows lie below and beside one another."""
        return max(1, grid.height // self.window), max(1, grid.width // self.window)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if step.stage:
            return Selection(tokens.best(tokens[step.sees[0]].mean(-1)[0]))
        kept = tokens.span.keep(self.keep)
        if kept == len(tokens):
            return tokens.everything()
        local = self.local(tokens, kept)
        rest = tokens[EncoderAttention(self.global_layer)].received().index_fill(0, local, -torch.inf)
        index = torch.cat([local, tokens.best(rest, kept - kept // 2)]).sort().values
        features, others = tokens.features.float(), tokens.others(index)
        unit = normalize(features, dim=-1)
        source = torch.empty_like(tokens.index)
        source[index] = torch.arange(len(index), device=index.device)
        for block in blocks(others, len(index)):
            source[block] = (unit[block] @ unit[index].T).argmax(dim=1)
        return Selection(index, merge(features, source, len(index)).to(tokens.features.dtype), source)

    def local(self, tokens: VisualTokens, kept: int) -> Tensor:
        """The places of the local tokens."""
        scores, (rows, columns) = tokens[EncoderAttention(self.local_layer)].received(), self.windows(tokens.span.grid)
        row, column = (tokens.place // tokens.span.grid.width, tokens.place % tokens.span.grid.width)
        row, column = (row // self.window).clamp(max=rows - 1), (column // self.window).clamp(max=columns - 1)
        ranked = scores.sort(descending=True, stable=True).indices
        window, order = (row * columns + column)[ranked].sort(stable=True)
        rank = torch.arange(len(window), device=window.device) - torch.searchsorted(window, window)
        most, count = self.locals(tokens.span.grid, kept)
        candidates = ranked[order][rank < most]
        return candidates[tokens.best(scores[candidates], count)]
