"""CATP (arXiv 2508.07871): pruning demonstrations with pictures, by their own texts and then by the question."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
    Geometry,
    Keep,
    Layer,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    cover,
)
from tokenreduce.signals import DecoderAttention, DecoderHidden, PairedText


@dataclass(frozen=True)
class Catp(TokenReducer):
    """Keep what covers each picture and fits its text, then what demonstrations give the question, and of its own
    picture what fits them.

    Half of what goes is dropped before the language model: every picture keeps tokens that cover it and are like the
    text behind it, in the language model's own embedding table. The other half goes inside. The tokens of all
    demonstrations are ranked together, by how much more the prompt's last token attends to them in ``layer`` than in
    the layer before, and by their likeness to the mean of the last picture and the text behind it. One layer later
    those of the last picture are ranked by their likeness to the mean of all before it, from the first picture on.

    keep:     of every picture, in the end.
    layer:    the layer whose attention is looked at; published are 6 in models of 7B and 10 in one of 13B.
    lambda_1: the weight of the text against coverage, before the language model.
    lambda_2: the weight of likeness against attention, inside it.

    By the paper alone, for there is no official code. It leaves open, and this method takes: that both halves are of
    what either kind of picture loses, that positions stay, that special tokens such as newlines stay, that cosines are
    scaled to 0..1 before the language model alone; and that without demonstrations the question's text takes their
    place. Presets: catp_r67, catp_r78 and catp_r90, the published shares that go, and catp_13b_r67 with its layer.
    """

    paper = "2508.07871"
    parity = "worked examples; no official code"

    positions: Positions = field(default="original", kw_only=True)
    keep: Keep = 1 / 3
    layer: Layer = 6 / 32
    lambda_1: float = 0.7
    lambda_2: float = 0.6

    def steps(self, geometry: Geometry) -> list[Step]:
        layer = geometry.decoder_layer(self.layer)
        if not 1 <= layer < geometry.decoder_layers - 2:
            raise ValueError(
                f"layer={self.layer} is layer {layer} of {geometry.decoder_layers}: CATP looks at one layer before it, "
                f"and drops tokens before the second behind it, so give 1..{geometry.decoder_layers - 3}"
            )
        rising = (DecoderAttention(layer - 1), DecoderAttention(layer), DecoderHidden())
        return [
            AtProjector(sees=(PairedText(),), scope="picture"),
            AtDecoder(layer=layer + 1, sees=rising, stage=1),
            AtDecoder(layer=layer + 2, sees=(DecoderAttention(layer + 1), DecoderHidden()), stage=2),
        ]

    def count(self, step: Step, span: Span) -> int:
        sizes: dict[int, int] = {}
        for tile in span.tiles:
            sizes[tile.picture] = sizes.get(tile.picture, 0) + len(tile.grid)
        *context, last = sizes.values()
        if step.stage == 0:
            return min(self._halfway(last), span.current)
        pruned = context if step.stage == 1 else [last]
        if not pruned:
            return span.current
        kept = max(1, math.floor(sum(map(self._kept, pruned)) + 1e-6))
        return max(1, span.current - sum(map(self._halfway, pruned)) + kept)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if step.stage == 0:
            text = tokens.each(PairedText())[0]
            return Selection(covering(tokens.features, text, tokens.keep, self.lambda_1).sort().values)
        pictures = torch.tensor([*(tile.picture for tile in tokens.span.tiles), -1], device=tokens.tile.device)
        picture = pictures[tokens.tile]  # -1 of special tokens
        own = picture == tokens.span.tiles[-1].picture
        *before, attention = (tokens[signal] for signal in step.sees[:-1])
        states = tokens[DecoderHidden()].float()
        first = attention.visual[own.int().argmax()]  # of the last picture
        place = torch.arange(len(states), device=states.device)
        if step.stage == 1:
            query = torch.cat([states[attention.visual[own]], states[attention.text]]).mean(dim=0)
            risen = attention.mean(-1)[0] - before[0].mean(-1)[0]
            scores = risen.clamp(min=0) + self.lambda_2 * cosine_similarity(states[attention.visual], query, dim=-1)
            ranked = ~own & (picture >= 0)
        else:
            context = (place >= attention.visual[0]) & (place < first)
            shown = torch.where(context.any(), context, torch.isin(place, attention.text))
            scores = cosine_similarity(states[attention.visual], states[shown].mean(dim=0), dim=-1)
            ranked = own
        return Selection(tokens.best(scores.masked_fill(~ranked, torch.inf)))

    def _kept(self, size: int) -> float:
        """How many tokens of a picture of ``size`` are to stay in the end, before rounding."""
        return size * self.keep if isinstance(self.keep, float) else min(self.keep, size)

    def _halfway(self, size: int) -> int:
        """How many tokens of a picture of ``size`` enter the language model."""
        return max(1, math.floor((size + self._kept(size)) / 2 + 1e-6))


def covering(features: Tensor, text: Tensor, count: int, weight: float) -> Tensor:
    """The places of ``count`` tokens, in the order of picking, whose likenesses, from 0 to 1, cover all tokens and,
    by ``weight``, fit the mean of ``text`` (tokens, dim) best."""
    unit = normalize(features.float(), dim=-1)
    likeness = (unit @ unit.T).add_(1).div_(2)
    fits = None if not len(text) else weight * (1 + unit @ normalize(text.float().mean(dim=0), dim=-1)) / 2
    return cover(likeness, count, gains=fits)
