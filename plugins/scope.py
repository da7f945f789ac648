"""SCOPE (arXiv 2510.24214): the tokens that cover most of the picture, weighted by what the class token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Layer, Selection, Step, TokenReducer, VisualTokens, cover
from tokenreduce.signals import EncoderAttention, EncoderHidden


@dataclass(frozen=True)
class Scope(TokenReducer):
    """Keep the tokens that cover most of the picture, where those that the class token attends to count more.

    A token is covered as far as its most similar kept one is like it. Tokens are picked one by one: always the one
    with the largest product of how much coverage it adds and of its attention to the power ``alpha``. 0 leaves the
    attention out. Likeness is the cosine of the encoder's features, where a negative one covers nothing; ``layer`` is
    the encoder layer of both attention and features. ``keep`` is of one tile: the published budgets of pictures that
    are cut up are those of all tiles together.

    Summaries of the paper have it prune inside the language model; this follows the released code. Its sum instead of
    the product, an ablation, is left out. In an encoder without class token, which the authors do not cover, the
    attention that tokens receive from all tokens takes its place; where a token is made of several patches, their
    means count. Presets: scope_192, scope_128 and scope_64, the published budgets.
    """

    paper = "2510.24214"
    parity = "official vectors, 4 cases"

    keep: Keep = 1 / 9
    alpha: float = 1.0
    layer: Layer = -2

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(EncoderAttention(self.layer), EncoderHidden(self.layer)))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention, features = (tokens[signal] for signal in step.sees)
        unit = normalize(features.float(), dim=-1)
        return Selection(cover(unit @ unit.T, tokens.keep, factors=attention.received() ** self.alpha).sort().values)
