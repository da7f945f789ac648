"""Shortening a prompt to the placeholders of the visual tokens that stay, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenreduce.models.family import ModelFamily


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts with some columns taken out.

    full:      ``(rows, length)`` long, the caller's token ids.
    full_mask: ``(rows, length)``, the caller's mask: 0 at padding.
    columns:   ``(rows, shorter)`` long, the caller's column that each remaining column was; 0 at padding.
    mask:      ``(rows, shorter)``, in the caller's dtype: 0 at padding.
    positions: ``(..., rows, length)`` long, the position ids of the caller's columns.
    pad:       the token id to write at padding.
    compact:   True if positions close up behind what is gone.
    """

    full: Tensor
    full_mask: Tensor
    columns: Tensor
    mask: Tensor
    positions: Tensor
    pad: int
    compact: bool

    @property
    def removed(self) -> int:
        """By how many columns the batch became narrower."""
        return self.full.shape[1] - self.columns.shape[1]

    @property
    def lengths(self) -> list[int]:
        """The tokens of every row that the language model sees."""
        return (self.mask != 0).sum(-1).tolist()

    @property
    def input_ids(self) -> Tensor:
        return self.gather(self.full).masked_fill(self.mask == 0, self.pad)

    def at(self, rows: Tensor) -> Prompt:
        """The same of some rows ``(n,)``, in that order, perhaps several times."""
        each = (self.full, self.full_mask, self.columns, self.mask)
        full, full_mask, columns, mask = (value[rows.to(value.device)] for value in each)
        positions = self.positions.index_select(-2, rows.to(self.positions.device))
        return Prompt(full, full_mask, columns, mask, positions, self.pad, self.compact)

    def cropped(self, count: int) -> Prompt:
        """The same without its last ``count`` columns, of which none was taken out."""
        left, whole = self.columns.shape[1] - count, self.full.shape[1] - count
        return replace(
            self,
            full=self.full[:, :whole],
            full_mask=self.full_mask[:, :whole],
            columns=self.columns[:, :left],
            mask=self.mask[:, :left],
            positions=self.positions[..., :whole],
        )

    def gather(self, values: Tensor) -> Tensor:
        """What ``values`` of shape ``(..., rows, length)`` or ``(1, length)`` hold at the remaining columns."""
        values = values.expand(*values.shape[:-2], *self.full.shape)
        return values.gather(-1, self.columns.expand(*values.shape[:-2], *self.columns.shape))

    def restore(self, sequences: Tensor) -> Tensor:
        """Put the caller's prompt back before what was generated; ``sequences`` may hold several rows for each
        prompt."""
        prompt = self.full.repeat_interleave(len(sequences) // len(self.full), dim=0).to(sequences.device)
        return torch.cat([prompt, sequences[:, self.columns.shape[1] :]], dim=1)

    def extended(self, more: Tensor, mask: Tensor | None) -> Prompt:
        """This prompt with the columns ``more`` (rows, n) behind it, none of them taken out; ``mask`` is the
        caller's whole one."""
        rows, added = more.shape
        length = self.full.shape[1]
        tail = self.mask.new_ones(rows, added) if mask is None else mask[:, -added:].to(self.mask.dtype)
        columns = torch.arange(length, length + added, device=self.columns.device).expand(rows, added)
        steps = torch.arange(1, added + 1, device=self.positions.device)
        return Prompt(
            torch.cat([self.full, more], dim=1),
            torch.cat([self.full_mask, tail], dim=1),
            torch.cat([self.columns, columns], dim=1),
            torch.cat([self.mask, tail], dim=1),
            torch.cat([self.positions, self.positions.amax(-1, keepdim=True) + steps], dim=-1),
            self.pad,
            self.compact,
        )


def shorten(
    input_ids: Tensor,
    attention_mask: Tensor,
    visual: Tensor,
    kept: Sequence[Tensor],
    positions: Tensor,
    pad: int,
    compact: bool,
) -> Prompt:
    """Keep all text and, of the visual tokens of row ``i``, those at the columns ``kept[i]`` ``(k,)``, in that order.

    visual: ``(rows, length)`` bool, where visual tokens stand; positions: ``(..., rows or 1, length)``.
    Padding goes to the side that the caller padded; rows are as wide as the longest one needs.
    """
    rows = []
    for valid, places, chosen in zip(attention_mask != 0, visual, kept, strict=True):
        chosen = chosen.to(input_ids.device)
        stays = valid & ~places
        stays[chosen] = True
        columns = stays.nonzero()[:, 0]
        columns[places[columns]] = chosen
        rows.append(columns)
    width = max(len(columns) for columns in rows)
    left = bool((attention_mask[:, 0] == 0).any())
    packed = input_ids.new_zeros(len(rows), width)
    packed_mask = attention_mask.new_zeros(len(rows), width)
    for row, columns in enumerate(rows):
        place = slice(width - len(columns), None) if left else slice(len(columns))
        packed[row, place] = columns
        packed_mask[row, place] = 1
    positions = positions.expand(*positions.shape[:-2], *input_ids.shape)
    return Prompt(input_ids, attention_mask, packed, packed_mask, positions, pad, compact)


def positions_of(family: ModelFamily, prompt: Prompt, padding_counts: bool) -> Tensor:
    """Position ids of a shortened prompt: ``(rows, shorter)``, or ``(4, rows, shorter)`` with those in space and time.

    ``generate`` does not count padding, and in most models a plain forward call without position ids does
    (``padding_counts``): the reduced call does likewise.
    """
    first = family.first_position if padding_counts else 0
    if padding_counts and family.counts_padding:
        columns = torch.arange(prompt.columns.shape[1], device=prompt.columns.device).expand(prompt.columns.shape)
        return first + (columns if prompt.compact else prompt.columns)
    if not prompt.compact:
        return first + prompt.gather(prompt.positions)
    compact = ((prompt.mask != 0).long().cumsum(-1) - 1).clamp(min=0)
    if prompt.positions.ndim > 2:
        positions = torch.cat([compact[None], prompt.gather(prompt.positions[1:])])
        for row, visual in enumerate(family.visual(prompt.full)):
            slots = prompt.mask[row] != 0
            positions[1:, row, slots] = closed_up(prompt.positions[1:, row], visual, prompt.columns[row, slots])
        return first + positions
    first_column = (prompt.full_mask != 0).int().argmax(-1, keepdim=True)
    return first + prompt.positions.gather(-1, first_column) + compact  # a caller's may begin anywhere


def closed_up(positions: Tensor, visual: Tensor, columns: Tensor) -> Tensor:
    """Positions in space and time of what is left of one prompt, without the gaps: ``(axes, n)``.

    positions: ``(axes, length)`` long, those of the whole prompt; visual: ``(length,)`` bool, where its visual tokens
    stand; columns: ``(n,)`` long, what is left.

    Along every axis the visual tokens that are left of a picture take its first positions, so that rows, columns and
    frames of which nothing is left close up and the others keep their arrangement; what follows moves up as far.
    """
    result = positions[:, columns]
    edges = torch.nn.functional.pad(visual.long(), (1, 1)).diff()
    runs = list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
    moved = torch.zeros_like(columns)
    for start, end in runs:
        own, whole = (columns >= start) & (columns < end), positions[:, start:end]
        last = whole.min() - 1
        if bool(own.any()):
            for axis, values in enumerate(whole):
                _, places = result[axis, own].unique(return_inverse=True)
                result[axis, own] = values.unique()[places]
            last = result[:, own].max()
        moved = torch.where(columns >= end, moved + (whole.max() - last), moved)
    return result - moved
