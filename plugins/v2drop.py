"""V2Drop (arXiv 2509.01552): the visual tokens that a layer of the language model hardly changes are not needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tokenreduce.reducer import (
    AtDecoder,
    Geometry,
    Keep,
    Layer,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.signals import ProjectedFeatures


@dataclass(frozen=True)
class V2Drop(TokenReducer):
    """At a few depths of the language model, keep the visual tokens whose state the last layer changed most.

    layers: how many layers have run before each drop, at least one.
    ratios: what each drop leaves, of the tokens still there, rounded down; at least one token, also of ratio 0.

    The change is the Euclidean length of the difference between a layer's input and output, without norms, in float32.
    The official code guesses by length whether there is a picture, and where; here the tokens of all images of a prompt
    compete. Presets: v2drop_llava, which is the default, and v2drop_qwen, as published for Qwen2-VL.
    """

    paper = "2509.01552"
    parity = "official vectors, 5 cases, with the official layers' places"

    positions: Positions = field(default="original", kw_only=True)
    layers: tuple[Layer, ...] = (3 / 32, 17 / 32, 22 / 32)
    ratios: tuple[float, ...] = (0.5, 0.5, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != len(self.ratios):
            raise ValueError(f"layers={self.layers} and ratios={self.ratios}: give one ratio for every layer")
        if not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios={self.ratios} are of the tokens still there: give numbers from 0 to 1")

    def steps(self, geometry: Geometry) -> list[Step]:
        drops = [max(1, geometry.decoder_layer(layer)) for layer in self.layers]
        if sorted({*drops}) != drops:
            raise ValueError(
                f"layers={self.layers} are layers {drops} of {geometry.decoder_layers}: give layers that ascend"
            )
        looks = dict.fromkeys(layer - 1 for layer in drops if layer > 1 and layer - 1 not in drops)
        acts = [(layer, stage) for stage, layer in enumerate(drops)] + [(layer, -1) for layer in looks]
        sees = (ProjectedFeatures(),)
        return [AtDecoder(layer=layer, stage=stage, sees=sees if stage >= 0 else ()) for layer, stage in sorted(acts)]

    def count(self, step: Step, span: Span) -> int:
        return span.current if step.stage < 0 else max(1, int(span.current * self.ratios[step.stage]))

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        """Keep the states along, for the next layer to be compared with."""
        kept = torch.arange(len(tokens), device=tokens.features.device)
        if step.stage >= 0:
            before = tokens[ProjectedFeatures()][tokens.index] if tokens.values is None else tokens.values
            kept = tokens.best((tokens.features.float() - before.float()).norm(dim=-1))
        return Selection(kept, values=tokens.features[kept])

    def with_keep(self, keep: Keep) -> V2Drop:
        """``keep`` is the largest of the ratios; the others follow in the proportions that they have."""
        if isinstance(keep, int):
            raise TypeError("V2Drop drops in several layers, each a share of what is there: give a ratio")
        largest = max(self.ratios, default=0) or 1.0
        return replace(self, ratios=tuple(ratio / largest * keep for ratio in self.ratios))
