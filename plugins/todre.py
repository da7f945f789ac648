"""ToDRE (arXiv 2505.18757v2): the tokens that are least alike, and none where the text no longer looks at them.

The authors published no code; the reference is the paper's second version. The first picks by another rule, the
farthest from its nearest, which is DivPrune's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
    blocks,
    check_keep,
)
from tokenreduce.signals import Attention, DecoderAttention, EncoderAttention


@dataclass(frozen=True)
class ToDre(TokenReducer):
    """Keep the tokens that are least alike, summed over all kept ones, and drop them late where the text ignores them.

    keep:      how many tokens of all pictures of a prompt enter the language model.
    pivot:     the encoder layer whose class token's attention says which token is the first; without class token, that
               of all tokens.
    layer:     how many layers of the language model have run before all visual tokens may be dropped, 28 of 32.
    threshold: the paper's tau: they are dropped if both the text's attention to them, and theirs to the text, is less.

    What follows is always the token with the least sum of cosines to those kept. Of a picture that is cut up only the
    overview can give the first one. Attention is that of the layer before ``layer``, averaged over heads and tokens;
    the text is what stands behind the last visual token, which these see in few models. Order and position ids stay as
    they were, of which the paper says nothing. Presets: todre_r25 and todre_r10, the published budgets.
    """

    paper = "2505.18757v2"
    parity = "worked examples; no official code"

    positions: Positions = field(default="original", kw_only=True)
    keep: Keep = 0.25
    pivot: Layer = -1
    layer: Layer = 7 / 8
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(float(self.threshold))

    def steps(self, geometry: Geometry) -> list[Step]:
        late = DecoderAttention(geometry.decoder_layer(self.layer) - 1)
        return [
            AtProjector(keep=self.keep, scope="sample", sees=(EncoderAttention(self.pivot),)),
            AtDecoder(layer=self.layer, stage=1, sees=(late,)),
        ]

    def count(self, step: Step, span: Span) -> int | tuple[int, int]:
        return (0, span.current) if step.stage else span.keep(self.keep)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if step.stage:
            attention = tokens[step.sees[0]]
            return Selection(tokens.index[:0]) if ignored(attention, self.threshold) else tokens.everything()
        seen = torch.cat([attention.received() for attention in tokens.each(EncoderAttention(self.pivot))])
        part = torch.tensor([tile.role == "crop" for tile in tokens.span.tiles], device=seen.device)[tokens.tile]
        pivot = seen.masked_fill(part & ~part.all(), -torch.inf).argmax(keepdim=True)
        return Selection(unlike(normalize(tokens.features.float(), dim=-1), pivot, tokens.keep).sort().values)


def unlike(unit: Tensor, pivot: Tensor, count: int) -> Tensor:
    """The places of ``count`` of the directions ``(n, dim)`` in the order of picking: first ``pivot`` ``(1,)``, then
    always the one with the least sum of cosines to those picked before; the first of these where several tie."""
    likeness, picked = unit.new_zeros(len(unit)), [pivot]
    for _ in range(count - 1):
        likeness = (likeness + unit @ unit[picked[-1]][0]).index_fill(0, picked[-1], torch.inf)
        picked.append(likeness.argmin(keepdim=True))
    return torch.cat(picked)


def ignored(attention: Attention, threshold: float) -> bool:
    """True if text and visual tokens pay each other less than ``threshold`` of their attention; not without text."""
    if attention.text is None or not len(attention.text):
        return False
    places = torch.arange(attention.keys.shape[1], device=attention.keys.device)
    text, visual = attention.text, places[attention.visual]
    pairs = [(text, visual)] if attention.causal else [(text, visual), (visual, text)]
    return all(bool(share(attention, queries, keys) < threshold) for queries, keys in pairs)


def share(attention: Attention, queries: Tensor, keys: Tensor) -> Tensor:
    """The part of their attention that some queries pay to some keys, averaged over heads and queries."""
    parts = [attention.mean(block, keys).sum() for block in blocks(queries, attention.keys.shape[1])]
    return torch.stack(parts).sum() / len(queries)
