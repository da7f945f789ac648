"""One call of an attached model: everything that belongs to it, and nothing of it anywhere else.

A call is found again by the hooks through a context variable, so that threads, nested contexts and several models at
once do not see one another's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenreduce.models.family import ModelFamily, Picture
from tokenreduce.passage import Journey, SampleReduction

if TYPE_CHECKING:
    from tokenreduce.attach.attachment import Attachment
    from tokenreduce.attach.encoding import Encoding, ReducedPicture
    from tokenreduce.attach.prompt import Prompt
    from tokenreduce.attach.stage import Prefill, Stage

_calls: ContextVar[tuple[Call, ...]] = ContextVar("tokenreduce_calls", default=())


@dataclass(eq=False)
class Call:
    """A call of ``forward``, or of ``generate`` with all the forward calls that it makes.

    inputs:     the caller's, by name.
    generating: True within ``generate``.
    rows:       for every prompt its pictures, each with its number in the call and the columns of its placeholders.
    pictures:   every picture of the call on its way to the language model.
    journeys:   every prompt's tokens on their way; as they entered the language model once they have.
    prompt:     what is left of the prompts before the language model; None where nothing acts there.
    width:      how many columns ``generate`` gives the language model as the prompt, None outside it.
    encoding:   the run of the vision tower in progress; prefill: that of the language model.
    samples:    what was done to every prompt, once it is.
    stages:     what the language model's layers lost in the first prefill; cache: the one that knows of it.
    spatial:    the positions in space and time of the tokens that the language model runs on now, ``(3, rows, n)``.
    moved:      the positions of tokens that follow a cut, for the layers behind it.
    """

    attachment: Attachment
    inputs: dict[str, Any]
    generating: bool = False
    rows: list[list[tuple[int, Tensor]]] = field(default_factory=list)
    pictures: list[ReducedPicture] = field(default_factory=list)
    journeys: list[Journey] = field(default_factory=list)
    prompt: Prompt | None = None
    width: int | None = None
    encoding: Encoding | None = None
    prefill: Prefill | None = None
    samples: list[SampleReduction] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    cache: Any = None
    spatial: Tensor | None = None
    moved: tuple[Any, Any, dict[str, Any]] = (None, None, {})

    @classmethod
    def of(cls, attachment: Attachment) -> Call | None:
        """The call of an attachment that goes on here."""
        return next((call for call in reversed(_calls.get()) if call.attachment is attachment), None)

    @contextmanager
    def current(self) -> Iterator[Call]:
        """Be the call that goes on here."""
        token = _calls.set((*_calls.get(), self))
        try:
            yield self
        finally:
            _calls.reset(token)

    def question(self, row: int) -> str | None:
        """What a prompt asks. Raises ``ValueError`` for as many questions as do not fit."""
        asked = self.attachment.question
        if asked is None or isinstance(asked, str):
            return asked
        if len(asked) != len(self.rows):
            raise ValueError(
                f"{len(asked)} questions do not fit {len(self.rows)} prompts: give one for each, or one text"
            )
        return asked[row]

    def fingerprint(self, row: int, tiles: Sequence[int]) -> int:
        """The same for the same pixels in every batch; ``tiles`` are numbers of some of a prompt's tiles."""
        wanted, seen, first, total = set(tiles), 0, 0, 0
        for number, _ in self.rows[row]:
            picture = self.pictures[number].picture
            own = [tile for tile in range(len(picture.tiles)) if first + tile in wanted]
            first += len(picture.tiles)
            if own:
                total += _checksum(picture.pixels) + (own[0] if len(wanted) == 1 else 0) + seen
                seen += 1
        return total

    def noted(self, journeys: Sequence[Journey], lengths: Sequence[tuple[int, ...]]) -> None:
        """Write down what was done to every prompt; ``lengths`` are what it has at the input of every decoder layer."""
        self.samples = [
            SampleReduction(
                images=tuple(
                    tile.reduction(track)
                    for tile, track in zip(
                        (tile for number, _ in row for tile in self.pictures[number].tiles), journey.tiles, strict=True
                    )
                ),
                visual_tokens=sum(len(self.pictures[number].picture.tokens) for number, _ in row),
                entering=len(journey.entered),
                lengths=length,
            )
            for row, journey, length in zip(self.rows, journeys, lengths, strict=True)
        ]

    def inside(self, prefill: Prefill, copies: int) -> None:
        """Write down what a prefill did to every prompt, which stands in so many rows. Without a cache every step
        prefills again; the first one is what counts."""
        if self.stages:
            return
        self.stages = prefill.stages
        if not self.rows:
            return
        stages = [prefill.stage(layer) for layer in range(self.attachment.family.geometry.decoder_layers)]
        places = range(0, len(prefill.strands), copies)
        valid = [prefill.valid if stage is None else stage.valid for stage in stages]
        sums = {id(each): each.sum(-1).tolist() for each in valid}
        lengths = [tuple(sums[id(each)][place] for each in valid) for place in places]
        self.noted([prefill.strands[place].journey for place in places], lengths)


def is_calling(model: nn.Module | None) -> bool:
    """True within a call of an attached model: of this one, or of any where it is None."""
    return any(model is None or call.attachment.model is model for call in _calls.get())


def placed(
    family: ModelFamily, inputs: Mapping[str, Any], pictures: Sequence[Picture]
) -> list[list[tuple[int, Tensor]]]:
    """For every prompt its pictures, in its own order, each with its number in the call and the columns of its
    placeholders ``(placeholders,)``. Raises ``ValueError`` where placeholders and pictures do not match."""
    ids = inputs["input_ids"].cpu()
    rows: list[list[tuple[int, Tensor]]] = [[] for _ in ids]
    for modality, placeholder in family.placeholders.items():
        waiting = [number for number, picture in enumerate(pictures) if picture.modality == modality]
        total = len(waiting)
        for row, prompt in enumerate(ids):
            columns = (prompt == placeholder).nonzero()[:, 0]
            while len(columns) and waiting:
                needed = len(pictures[waiting[0]].tokens)
                if needed > len(columns):
                    break
                rows[row].append((waiting.pop(0), columns[:needed]))
                columns = columns[needed:]
            if len(columns):
                has = int((prompt == placeholder).sum())
                raise ValueError(
                    f"prompt {row} has {has} placeholders, which its {modality}s' visual tokens "
                    f"({', '.join(str(len(picture.tokens)) for picture in pictures)} in this call) do not fill"
                )
        if waiting:
            raise ValueError(
                f"the prompts have placeholders for {total - len(waiting)} {modality}s, but there are {total}"
            )
    return [sorted(row, key=lambda each: int(each[1][0])) for row in rows]


def _checksum(pixels: Tensor) -> int:
    """The same for the same pixels in every batch."""
    return zlib.crc32(pixels.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
