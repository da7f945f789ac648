"""VisionZip (arXiv 2412.04467): dominant tokens, and contextual ones that the others are merged into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import (
    AtEncoderOutput,
    Geometry,
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
from tokenreduce.signals import ClassToken, EncoderAttention


@dataclass(frozen=True)
class VisionZip(TokenReducer):
    """Keep the class token and the patches that it attends to, and merge the others around evenly spread ones.

    ``keep`` counts all rows: the class token, which goes on to the language model as published, the dominant patches,
    and the ``contextual`` ones (a share of ``keep``, or a number), which stand behind the others. A contextual row is
    its patch plus the mean of those merged into it, as in the official code; the paper says average. In an encoder
    without class token, which the authors do not cover, dominant patches are those that receive most attention.

    Two numbers are the official arguments, and may ask for more rows than there are patches, for which a prompt has no
    place. With a single patch left to be contextual, all contextual rows are that one, as in the official code; with
    several, but too few, the last one is repeated, where the official code stops with an error.

    Presets: visionzip_64, visionzip_128 and visionzip_192, the published budgets.
    """

    paper = "2412.04467"
    parity = "official vectors, 5 cases; 2 on a real tower"
    merges = True

    keep: Keep = 1 / 9
    contextual: Keep = 10 / 64
    layer: Layer = -2

    def steps(self, geometry: Geometry) -> list[Step]:
        class_token = (ClassToken(),) if geometry.class_token else ()
        return [AtEncoderOutput(keep=self.keep, sees=(EncoderAttention(self.layer), *class_token))]

    def count(self, step: Step, span: Span) -> int:
        class_token = int(span.geometry.class_token)
        kept = span.keep(self.keep)
        if isinstance(self.keep, int) and isinstance(self.contextual, int):
            kept = min(self.keep, span.entered - 1 + class_token + self.contextual)
        contextual = tokens_to_keep(self.contextual, kept, "round")
        needed = contextual + class_token
        if kept < needed and isinstance(self.keep, int):
            raise ValueError(
                f"keep={self.keep} leaves {kept} rows, too few for the class token and {contextual} merged"
            )
        return max(kept, needed)  # of a small tile a ratio may leave less

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        kept, device = tokens.keep, tokens.features.device
        contextual = tokens_to_keep(self.contextual, kept, "round")
        attention = tokens[EncoderAttention(self.layer)]
        passed_on = int(attention.class_token is not None)

        dominant = tokens.best(attention.received(), kept - contextual - passed_on)
        rest = tokens.others(dominant)
        targets = rest[:: max(1, len(rest) // contextual)][:contextual]
        others = tokens.others(torch.cat([dominant, targets]))
        metric = normalize(attention.keys.float().mean(dim=0)[attention.visual], dim=-1)
        parts = blocks(others, len(targets))
        nearest = torch.cat([(metric[some] @ metric[targets].T).argmax(dim=1) for some in parts])

        means = merge(tokens.features[others].float(), nearest, len(targets))
        merged = (tokens.features[targets].float() + means).to(tokens.features.dtype)

        first, repeated = kept - contextual, contextual - len(targets)
        source = torch.empty(len(tokens), dtype=torch.long, device=device)
        source[dominant] = torch.arange(passed_on, first, device=device)
        source[targets] = torch.arange(first, kept - repeated, device=device)
        source[others] = nearest + first
        none = torch.full_like(targets, -1)
        front: list[Tensor] = [tokens[ClassToken()][None]] if passed_on else []
        return Selection(
            torch.cat([none[:passed_on], dominant, targets, none[:1].expand(repeated)]),
            torch.cat([*front, tokens.features[dominant], merged, merged[-1:].expand(repeated, -1)]),
            source,
        )
