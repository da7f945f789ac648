"""Between the vision encoder and the projector, on the features that the projector takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenreduce.attach.call import Call
from tokenreduce.attach.encoding import Encoding
from tokenreduce.attach.groups import selected
from tokenreduce.attach.hooks import Hook
from tokenreduce.attach.site import Site
from tokenreduce.models.family import ModelFamily
from tokenreduce.reducer import AtEncoderOutput


class OutputSite(Site):
    """What comes out of the encoder is chosen from before the projector sees it."""

    kind = AtEncoderOutput
    label = name = "encoder output"

    @classmethod
    def refusal(cls, step: Any, family: ModelFamily) -> str | None:
        if step.scope == "sample":
            return "pictures and videos of a prompt go through its vision tower apart; they are together AtProjector"
        return super().refusal(step, family)

    def modules(self) -> list[nn.Module]:
        return [self.family.projector]

    @contextmanager
    def installed(self) -> Iterator[None]:
        hook = self.family.projector.register_forward_pre_hook(Hook(self._before_projector))
        try:
            yield
        finally:
            hook.remove()

    def _before_projector(self, projector: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        call = Call.of(self.attachment)
        if call is None or call.encoding is None or projector is not self.family.projector:
            return None
        return (self._reduced(call.encoding, args[0]),)

    def _reduced(self, encoding: Encoding, whole: Tensor) -> Tensor:
        """The features ``(sequences, n, dim)`` that the projector takes."""
        sequences, shortens = list(whole), self.family.shortens
        tiles = encoding.tiles
        homes, features = [], []
        for tile in tiles:
            sequence = sequences[tile.tile.sequence - encoding.first]
            # A projector that takes the class token too has it before the patches.
            homes.append(len(sequence) - tile.tile.encoded + tile.patches.to(sequence.device))
            features.append(sequence if shortens else sequence[homes[-1]])
        for step in self.steps:
            features = [rows for (rows,) in selected(self, encoding.call, step, tiles, [(one,) for one in features])]
        for tile, home, rows in zip(tiles, homes, features, strict=True):
            number = tile.tile.sequence - encoding.first
            if shortens:
                sequences[number] = rows
            else:  # the model packs whole tiles: rows stand where their tokens did, and nobody reads the others
                sequences[number] = sequences[number].clone()
                sequences[number][home[tile.places().to(home.device)]] = rows
        padded = pad_sequence(sequences, batch_first=True)
        if not whole.is_contiguous():  # behind a class token: laid out like it, or a linear layer rounds otherwise
            padded = torch.cat([padded[:, :1], padded], dim=1)[:, 1:]
        return padded
