"""One prefill of the language model: the sequence that its layers see behind a cut, with its positions and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenreduce.attach import taps
from tokenreduce.attach.prompt import closed_up
from tokenreduce.models.stack import DecoderStack
from tokenreduce.passage import Strand


@dataclass(frozen=True)
class Stage:
    """The sequence from one cut to the next.

    layer:   the first layer that sees it.
    columns: ``(rows, n)`` long, the column of the whole prompt that every slot stands for; 0 at padding.
    valid:   ``(rows, n)`` bool, false at padding; padded: true if some is.
    lost:    ``(rows,)`` long, by how much the position ids of what follows become smaller where they close up.
    compact: whether positions close up behind what is gone; moves: true if what follows therefore moves up.
    length:  how wide the whole prompt is.
    spatial: ``(3, rows, n)`` long, closed up positions in space and time, where the model has such.
    sight:   ``(rows, n, n)`` int8, who may attend to whom, as of a :class:`~tokenreduce.reducer.Selection`; None where
             the layers alone say it.
    """

    layer: int
    columns: Tensor
    valid: Tensor
    padded: bool
    lost: Tensor
    compact: bool
    moves: bool
    length: int
    spatial: Tensor | None = None
    sight: Tensor | None = None

    @classmethod
    def whole(cls, valid: Tensor) -> Stage:
        """The stage before any cut."""
        columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        none = valid.new_zeros(len(valid), dtype=torch.long)
        return cls(0, columns, valid, not bool(valid.all()), none, False, False, valid.shape[1])

    def at(self, rows: Tensor) -> Stage:
        """The same of some rows ``(n,)``, in that order, perhaps several times."""
        rows = rows.to(self.valid.device)
        spatial = None if self.spatial is None else self.spatial[:, rows]
        sight = None if self.sight is None else self.sight[rows]
        columns, valid, lost = self.columns[rows], self.valid[rows], self.lost[rows]
        return replace(self, columns=columns, valid=valid, lost=lost, spatial=spatial, sight=sight)

    def cropped(self, count: int) -> Stage:
        """The same without its last ``count`` columns, of which none was cut."""
        left = self.columns.shape[1] - count
        spatial = None if self.spatial is None else self.spatial[..., :left]
        sight = None if self.sight is None else self.sight[:, :left, :left]
        columns, valid, length = self.columns[:, :left], self.valid[:, :left], self.length - count
        return replace(self, columns=columns, valid=valid, spatial=spatial, length=length, sight=sight)

    def mask(self, mask: Tensor | None, stack: DecoderStack, dtype: torch.dtype) -> Tensor | None:
        """What a layer is handed for its own mask of the whole prompt, in the form that its attention kernel takes."""
        mask = self._shortened(mask, stack, dtype)
        if self.sight is None:
            return mask
        if mask is not None and mask.ndim == 2:
            raise ValueError(
                f"{stack.kernel} takes no mask that says who may attend to whom: load the model with sdpa attention"
            )
        mask = stack.mask(causal(self.valid), dtype) if mask is None else mask
        allowed, refused = _extremes(mask)
        return mask.masked_fill(self.sight[:, None] > 0, allowed).masked_fill(self.sight[:, None] < 0, refused)

    def _shortened(self, mask: Tensor | None, stack: DecoderStack, dtype: torch.dtype) -> Tensor | None:
        """A layer's own mask at the remaining rows and columns; slots of padding see themselves alone."""
        if mask is None:
            return stack.mask(causal(self.valid), dtype) if self.padded else None
        if mask.ndim == 2:
            return self.valid.to(mask.dtype)
        rows, width = self.columns.shape
        mask = mask.expand(rows, -1, -1, -1)
        mask = mask.gather(2, self.columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, self.columns[:, None, None, :].expand(-1, mask.shape[1], width, -1))
        allowed, refused = _extremes(mask)
        mask = mask.masked_fill(~self.valid[:, None, None, :], refused)
        return mask.masked_fill(torch.diag_embed(~self.valid)[:, None], allowed)

    def behind(self, new: int, queries: int, window: int | None, slides: bool) -> Tensor:
        """What the last ``queries`` of ``new`` tokens behind the prompt may see of what a layer caches.

        ``(rows, queries, keys)`` bool. A ``window`` is counted in the whole prompt; where the layer ``slides``, its
        cache holds the last keys alone.
        """
        (rows, width), length = self.columns.shape, self.length
        allowed = causal(torch.cat([self.valid, self.valid.new_ones(rows, new)], dim=1))
        if self.sight is not None:
            last = width - 1 - self.valid.flip(-1).int().argmax(-1)
            hidden = self.sight[torch.arange(rows, device=last.device), last] < 0
            allowed[:, width:, :width] &= ~hidden[:, None]
        if window is not None:
            later = torch.arange(length, length + new, device=self.columns.device).expand(rows, new)
            columns = torch.cat([self.columns, later], dim=1)
            allowed = allowed & (columns[:, :, None] - columns[:, None, :] < window)
            if slides:
                allowed = allowed[..., -(min(width + new - queries, window - 1) + queries) :]
        return allowed[:, -queries:]


@dataclass
class Prefill:
    """One prefill in progress.

    valid:     ``(rows, length)`` bool, false at padding.
    strands:   every row's visual tokens.
    deepstack: what the model adds to the visual tokens behind each of its first layers, ``(rows, length, dim)``.
    positions: ``(rows, length)`` long, the position ids that the layers are given, None where they are given none.
    prepared:  what layers behind a cut are handed, by what makes it differ.
    """

    valid: Tensor
    strands: list[Strand]
    positions: Tensor | None = None
    embeddings: Tensor | None = None
    deepstack: list[Tensor] = field(default_factory=list)
    captured: taps.Captures = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    prepared: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def stage(self, layer: int) -> Stage | None:
        """The stage that ``layer`` sees, None before the first cut."""
        return next((stage for stage in reversed(self.stages) if stage.layer <= layer), None)

    @cached_property
    def _whole(self) -> Stage:
        return Stage.whole(self.valid)

    @property
    def last(self) -> Stage:
        """The stage behind the last cut, the whole prompt before the first."""
        return self.stages[-1] if self.stages else self._whole

    @cached_property
    def places(self) -> Tensor:
        """The position ids of the whole prompt ``(rows, length)``: those that the layers are given, or counted."""
        if self.positions is None:
            return (self.valid.long().cumsum(-1) - 1).clamp(min=0)
        return self.positions.long().expand(self.valid.shape)

    @cached_property
    def first(self) -> Tensor:
        """The first position id of every row ``(rows,)``."""
        return self.places.masked_fill(~self.valid, torch.iinfo(torch.long).max).amin(-1)

    def cut(
        self,
        layer: int,
        slots: Tensor,
        valid: Tensor,
        compact: bool,
        spatial: Tensor | None,
        sight: Tensor | None = None,
    ) -> None:
        """Open the stage behind a cut: ``slots`` of the last stage stay, ``(rows, n)`` as :func:`packed` gives them.
        ``spatial`` ``(3, rows or 1, length)`` are the whole prompt's positions in space and time, where it has such;
        ``sight`` is as of :class:`Stage`, of the last stage's slots."""
        columns = self.last.columns.gather(1, slots).masked_fill(~valid, 0)
        lost, closed = self.places.amax(-1) - self.first + 1 - valid.sum(-1), None
        if compact and spatial is not None:
            visual = [strand.entered for strand in self.strands]
            spatial = spatial.expand(-1, len(valid), -1)
            closed, lost = closed_up_in(self.valid, spatial, visual, columns, valid)
        if self.stages and self.stages[-1].layer == layer:
            self.stages.pop()  # two steps at one layer leave one stage
        padded, moves = not bool(valid.all()), compact and bool(lost.any())
        if sight is not None:
            rows = torch.arange(len(slots), device=slots.device)[:, None, None]
            sight = sight[rows, slots[:, :, None], slots[:, None]]
            sight = sight.masked_fill(~(valid[:, :, None] & valid[:, None]), 0)
        length = self.valid.shape[1]
        self.stages.append(Stage(layer, columns, valid, padded, lost, compact, moves, length, closed, sight))


def packed(kept: Sequence[Tensor], whole: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The slots that stay in every row, side by side with padding on the side where the prompts ``whole``
    ``(rows, length)`` have theirs: ``(rows, n)`` long, 0 at padding; ``(rows, n)`` bool, false there; and where in them
    every row begins."""
    rows, width = len(kept), max(len(slots) for slots in kept)
    right = bool(whole[:, 0].all()) and not bool(whole.all())
    starts = [0 if right else width - len(own) for own in kept]
    slots, valid = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.bool)
    for row, (start, own) in enumerate(zip(starts, kept, strict=True)):
        slots[row, start : start + len(own)] = own
        valid[row, start : start + len(own)] = True
    return slots, valid, starts


def sighted(before: Stage, new: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Who may attend to whom in a stage, ``(rows, n, n)`` int8, with what is new in every row: selections'
    ``(sequence, sequence)``, of which the last one that says anything counts. None where nobody says anything.

    Raises ``ValueError`` for one that is not of the row's sequence, or hides a token from itself.
    """
    if before.sight is None and not any(new):
        return None
    rows, width = before.valid.shape
    sight = (
        before.valid.new_zeros(rows, width, width, dtype=torch.int8) if before.sight is None else before.sight.clone()
    )
    for row, changes in enumerate(new):
        own = before.valid[row].nonzero()[:, 0]
        for change in changes:
            if change.dtype != torch.int8 or change.shape != (len(own), len(own)):
                raise ValueError(
                    f"a {change.dtype} sight of shape {tuple(change.shape)} for a sequence of {len(own)}: give int8 "
                    f"({len(own)}, {len(own)})"
                )
            if bool((change.diagonal() < 0).any()):
                raise ValueError("a sight hides a token from itself, which may leave it nothing to attend to")
            here, change = (row, own[:, None], own[None]), change.to(sight.device)
            sight[here] = torch.where(change == 0, sight[here], change)
    return sight


def closed_up_in(
    whole: Tensor, spatial: Tensor, visual: Sequence[Tensor], columns: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions in space and time ``(3, rows, n)`` without the gaps, and by how much what follows moves up ``(rows,)``.

    whole: ``(rows, length)`` bool, false at the padding of the whole prompts, whose positions ``spatial`` are; visual:
    for every row the columns of its visual tokens; columns, valid: of what is left, as of :class:`Stage`.
    """
    closed = spatial.new_zeros(len(spatial), *columns.shape)
    for row, own in enumerate(valid):
        here = torch.zeros_like(whole[row])
        here[visual[row]] = True
        closed[:, row, own] = closed_up(spatial[:, row], here, columns[row, own])
    before = spatial.masked_fill(~whole, -1).amax((0, 2))
    return closed, before - closed.masked_fill(~valid, -1).amax((0, 2))


def columns_of(angles: Tensor, columns: Tensor) -> Tensor:
    """Rotary embeddings ``(rows or 1, length, dim)`` at some columns ``(rows, n)``."""
    return angles.expand(len(columns), -1, -1).gather(1, columns[..., None].expand(-1, -1, angles.shape[-1]))


def _extremes(mask: Tensor) -> tuple[bool, bool] | tuple[float, float]:
    """What an attention kernel's mask has where something is allowed, and where it is not."""
    return (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)


def causal(valid: Tensor) -> Tensor:
    """Who may see whom, ``(rows, n, n)`` bool: everything valid up to oneself, and at padding oneself alone."""
    width = valid.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=valid.device).tril()
    return (causal & valid[:, None, :]) | torch.diag_embed(~valid)
