"""Visual tokens on their way through a reducer's steps: select, check, take, note. No hook, no engine, no model.

A :class:`Journey` is one prompt's way, a :class:`Track` the tokens of one of its tiles, and a :class:`Group` the tracks
that one selection is about. Whatever carries a reducer (``attach`` into transformers, another engine elsewhere) makes
the journeys, asks :meth:`Group.select` at every step, and does to its own tensors what that says. What every step did
is noted on the way, as :class:`StepReduction`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.counts import promised
from tokenreduce.reducer import Geometry, Grid, Role, Scope, Selection, Span, Step, Tile, TokenReducer, VisualTokens

Signals = Callable[[Any], Sequence[Any]]
"""Gives a declared signal's values: one for every tile, or one for all."""


@dataclass(frozen=True)
class StepReduction:
    """What one step did to one tile.

    site:   where it acted.
    index:  the tokens that stay, in the tile's own numbering; -1 for a row that stands for none (a class token).
    source: for each of the tile's tokens the row that it is in, -1 for a dropped one. Rows are counted within a tile.
    merged: True if rows are other than the tokens at ``index``.
    into:   for each of the tile's tokens the tile of the prompt whose row it is in, -1 for a dropped one and where that
            row stands for no tile's token; empty where all are in the tile's own rows.
    """

    site: str
    index: tuple[int, ...]
    source: tuple[int, ...]
    merged: bool = False
    into: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageReduction:
    """What a reducer did to one tile: an image, a tile of one where the model cuts images up, or a frame.

    encoded: how many patches the vision encoder saw in its place.
    role, picture, time: as of :class:`~tokenreduce.reducer.Tile`.
    """

    grid: Grid
    steps: tuple[StepReduction, ...] = ()
    encoded: int = 0
    role: Role = "whole"
    picture: int = 0
    time: float | None = None

    @property
    def part(self) -> bool:
        """True if it shows a part of its picture alone."""
        return self.role == "crop"

    @property
    def kept(self) -> Sequence[int]:
        """The tokens that stay after the last step."""
        return self.steps[-1].index if self.steps else range(len(self.grid))


@dataclass(frozen=True)
class SampleReduction:
    """What a reducer did to one prompt.

    visual_tokens: how many there were; entering: how many enter the language model.
    lengths: the prompt's length, text included, at the input of every decoder layer.
    """

    images: tuple[ImageReduction, ...]
    visual_tokens: int
    entering: int
    lengths: tuple[int, ...]


@dataclass(eq=False)
class Carried:
    """What one selection carried to the next step of the same member of a chain."""

    value: Any


@dataclass(eq=False)
class Track:
    """The tokens of one tile on their way; or the special tokens of one picture.

    tile:    what a method may know of it.
    number:  which of the prompt's tiles it is; below 0 for special tokens.
    token:   ``(k,)`` long, the tokens that its rows stand for; -1 for a row that stands for none.
    place:   ``(k,)`` long, likewise in the grid that entered, another one where the picture was made smaller.
    entered: ``(k,)`` long, the rows' places among its tokens that entered; total: how many did.
    arrival: ``(total,)`` long, those tokens' places among the sample's, None where tiles follow one another.
    sizes:   ``(k,)``, how many tokens were merged into each row; None while that counts for nothing.
    values:  by the member of a chain ``(k, ...)``, what follows the rows by its wish.
    carried: by the member of a chain what its last selection carried.
    merged:  True if the last step made rows that are other than their tokens.
    """

    tile: Tile
    number: int
    token: Tensor
    place: Tensor
    entered: Tensor
    total: int
    arrival: Tensor | None = None
    sizes: Tensor | None = None
    values: dict[int, Tensor] = field(default_factory=dict)
    carried: dict[int, Carried] = field(default_factory=dict)
    merged: bool = False
    steps: list[StepReduction] = field(default_factory=list)

    @classmethod
    def whole(cls, tile: Tile, number: int) -> Track:
        """A tile before any step."""
        places = torch.arange(len(tile.grid))
        return cls(tile, number, places, places, places, len(places))

    @classmethod
    def special(cls, picture: int, count: int) -> Track:
        """The special tokens of a picture, such as newlines, as they enter the language model."""
        none = torch.full((count,), -1)
        return cls(Tile(Grid(1, 1), picture=picture), -1 - picture, none, none, torch.arange(count), count)

    def __len__(self) -> int:
        return len(self.token)

    def resized(self, grid: Grid) -> None:
        """Be made smaller before the vision tower, so that these tokens of a smaller grid are what enters."""
        self.tile = replace(self.tile, grid=grid)
        self.place = self.entered = torch.arange(len(grid))
        self.total = len(grid)

    def arrived(self, arrival: Tensor) -> None:
        """Enter the language model: these rows are what enters, at the places ``arrival`` (k,) of the sample's."""
        self.arrival, self.total, self.entered = arrival, len(arrival), torch.arange(len(arrival))
        self.sizes = None

    def copy(self) -> Track:
        """The same state, to go another way from here."""
        own = {"values": dict(self.values), "carried": dict(self.carried), "steps": list(self.steps)}
        return Track(**{**vars(self), **own})


class Journey:
    """One prompt's visual tokens.

    tracks:  of every tile, in the order of the prompt. Once the language model is entered, those of special tokens
             follow.
    at:      ``(tokens, 2)`` long, for each token of each tile the number of the track and the row that it is in now, -1
             for a row that it has no more.
    crossed: True if a token is in a row of another track than its own.
    entered: ``(n, 2)`` long, once the language model is: for every token of the prompt's sequence of visual tokens the
             place of its track in ``tracks`` and its row in that.
    """

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self.tracks = [Track.whole(tile, number) for number, tile in enumerate(tiles)]
        self._starts = torch.tensor([0, *(len(track) for track in self.tracks)]).cumsum(0).tolist()
        numbers = [torch.full((len(track),), track.number) for track in self.tracks]
        rows = [track.token for track in self.tracks]
        empty = torch.empty(0, dtype=torch.long)
        self.at = torch.stack([torch.cat([empty, *numbers]), torch.cat([empty, *rows])], dim=1)
        self.crossed = False
        self.entered = torch.empty(0, 2, dtype=torch.long)

    def enter(self, order: Tensor) -> None:
        """Enter the language model in this order."""
        self.entered = order
        for place, track in enumerate(self.tracks):
            here = (order[:, 0] == place).nonzero()[:, 0]
            track.arrived(here[order[here, 1].argsort()])

    def copy(self) -> Journey:
        """The same state, to go another way from here."""
        journey = Journey([])
        journey.tracks = [track.copy() for track in self.tracks]
        journey.at, journey.crossed, journey._starts = self.at.clone(), self.crossed, self._starts
        journey.entered = self.entered
        return journey

    @property
    def tiles(self) -> list[Track]:
        return [track for track in self.tracks if track.number >= 0]

    def of(self, track: Track) -> slice:
        """Which of all tokens are a tile's."""
        return slice(self._starts[track.number], self._starts[track.number + 1])

    def note(self, site: str, tracks: Sequence[Track] | None = None) -> None:
        """Write down what a step did to these tiles, by default to every one."""
        for track in self.tiles if tracks is None else tracks:
            tiles, rows = self.at[self.of(track)].unbind(1)
            crossed = self.crossed and bool(((tiles != track.number) & (rows >= 0)).any())
            into = tuple(tiles.masked_fill(rows < 0, -1).clamp(min=-1).tolist()) if crossed else ()
            index = tuple(track.token.tolist())
            track.steps.append(StepReduction(site, index, tuple(rows.tolist()), track.merged, into))
            track.merged = False

    def moved(self, group: Group, source: Tensor, numbers: Tensor, rows: Tensor) -> None:
        """Follow all tokens that are in a group's rows to those that a selection made of them.

        source: ``(n,)`` long, the new row of every old one, -1 for a dropped one.
        numbers, rows: ``(k,)`` long, of every new row the track's number and its place among that track's rows.
        """
        alone = len(group.tracks) == 1 and group.tracks[0].number >= 0 and not self.crossed
        tokens = self.of(group.tracks[0]) if alone else slice(None)
        at = self.at[tokens]
        places = at[:, 1] if alone else group.places(at, self._special())
        here = places >= 0
        into = source[places.clamp(min=0)] if len(source) else torch.full_like(places, -1)
        stays = here & (into >= 0)
        moved = torch.stack([numbers, rows], dim=1)[into.clamp(min=0)] if len(rows) else at
        self.at[tokens] = torch.where(stays[:, None], moved, at.masked_fill(here[:, None], -1))
        if not alone and not self.crossed:
            sizes = torch.tensor(self._starts).diff()
            own = torch.arange(len(sizes)).repeat_interleave(sizes)
            self.crossed = bool(((self.at[:, 0] != own) & (self.at[:, 1] >= 0)).any())

    def _special(self) -> int:
        """How many tracks of special tokens there may be."""
        return max((track.tile.picture + 1 for track in self.tracks), default=0)


class Group:
    """The tracks that one selection is about, and the order in which their rows are shown.

    tracks: some of one journey's.
    order:  ``(n, 2)`` long, for each row that is shown the place of its track in ``tracks`` and its row in that. By
            default the tracks one after the other.
    """

    def __init__(self, journey: Journey, tracks: Sequence[Track], order: Tensor | None = None) -> None:
        self.journey = journey
        self.tracks = list(tracks)
        if order is None:
            owner = torch.cat([torch.full((len(track),), place) for place, track in enumerate(self.tracks)])
            order = torch.stack([owner, torch.cat([torch.arange(len(track)) for track in self.tracks])], dim=1)
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def gathered(self, each: Sequence[Tensor]) -> Tensor:
        """What every track has for its rows ``(k, ...)``, in the order that is shown: ``(n, ...)``."""
        whole = torch.cat(list(each)) if len(each) > 1 else each[0]
        starts = torch.tensor([0, *(len(one) for one in each)]).cumsum(0)
        places = starts[self.order[:, 0]] + self.order[:, 1]
        return whole[places.to(whole.device)]

    def places(self, at: Tensor, special: int) -> Tensor:
        """The place ``(tokens,)`` in this group of rows given as track and row ``(tokens, 2)``, -1 for those of others;
        ``special`` is how many tracks of special tokens there may be."""
        numbers = torch.tensor([track.number for track in self.tracks])
        highest = max(int(numbers.max()), int(at[:, 0].max()) if len(at) else 0)
        widest = max([int(at[:, 1].max()) if len(at) else 0, *map(len, self.tracks)])
        table = torch.full((highest + 1 + special, widest + 1), -1)
        table[numbers[self.order[:, 0]], self.order[:, 1]] = torch.arange(len(self))
        return torch.where(at[:, 1] < 0, -1, table[at[:, 0], at[:, 1]])

    def span(self, geometry: Geometry) -> Span:
        """The layout and the counts, as a method is told them."""
        tiles = [track for track in self.tracks if track.number >= 0]
        return Span(geometry, tuple(track.tile for track in tiles), self.entered, len(self))

    @property
    def entered(self) -> int:
        """How many tokens entered."""
        return sum(track.total for track in self.tracks)

    def select(
        self,
        reducer: TokenReducer,
        step: Step,
        features: Tensor,
        geometry: Geometry,
        signals: Signals | None = None,
        fingerprint: Callable[[], int] = lambda: 0,
    ) -> Taken:
        """Let the reducer choose among the rows, whose features are ``(n, dim)``, and take what it chose.

        Raises ``ValueError`` for a selection that does not hold together.
        """
        span, device = self.span(geometry), features.device
        owner = torch.tensor([_numbered(self.tracks, place) for place in range(len(self.tracks))])
        tokens = VisualTokens(
            features,
            span,
            promised(reducer, step, span),
            index=self._index().to(device),
            tile=owner[self.order[:, 0]].to(device),
            place=self.gathered([track.place for track in self.tracks]).to(device),
            values=self._values(step.member),
            signals=signals,
            fingerprint=fingerprint,
            carried=self._carried(step.member),
        )
        return self.take(step, checked(reducer, step, tokens))

    def _index(self) -> Tensor:
        """The rows' places among the tokens of the scope that entered: ``(n,)`` long."""
        starts = torch.tensor([0, *(track.total for track in self.tracks)]).cumsum(0)
        places = starts[self.order[:, 0]] + self.gathered([track.entered for track in self.tracks])
        arrivals = [track.arrival for track in self.tracks if track.arrival is not None]
        return torch.cat(arrivals).argsort().argsort()[places] if arrivals else places

    def _values(self, member: int) -> Tensor | None:
        given = [track.values[member] for track in self.tracks if member in track.values]
        if not given:
            return None
        none = given[0].new_zeros(1, *given[0].shape[1:])
        return self.gathered(
            [track.values.get(member, none.expand(len(track), *none.shape[1:])) for track in self.tracks]
        )

    def _carried(self, member: int) -> Any:
        """What earlier selections carried: the only one's, or a list of what those of several did."""
        given = dict.fromkeys(track.carried[member] for track in self.tracks if member in track.carried)
        values = [one.value for one in given]
        if all(value is None for value in values):
            return None
        return values[0] if len(values) == 1 else values

    def take(self, step: Step, selection: Selection) -> Taken:
        """Take what was chosen."""
        index, source = selection.index.cpu(), selection.sources(len(self)).cpu()
        track = self._tracks_of(index)
        own = [(track == place).nonzero()[:, 0] for place in range(len(self.tracks))]
        order = torch.stack([track, torch.empty_like(track)], dim=1)
        for rows in own:
            order[rows, 1] = torch.arange(len(rows))
        numbers = torch.tensor([one.number for one in self.tracks])
        self.journey.moved(self, source, numbers[track], order[:, 1])
        carried, chosen = Carried(selection.carry), []
        for one, rows in zip(self.tracks, own, strict=True):
            before = torch.where(index[rows] < 0, -1, self.order[index[rows].clamp(min=0), 1]) if len(self) else rows
            one.token, one.place = followed(one.token, before), followed(one.place, before)
            one.entered = followed(one.entered, before)
            one.sizes = None if selection.size is None else selection.size[rows.to(selection.size.device)]
            one.values = {member: followed(values, before, 0) for member, values in one.values.items()}
            if selection.values is not None:
                one.values[step.member] = selection.values[rows.to(selection.values.device)]
            one.carried[step.member], one.merged = carried, selection.features is not None
            chosen.append(before)
        self.order = order
        return Taken(selection, chosen, own)

    def _tracks_of(self, index: Tensor) -> Tensor:
        """The track of every row ``(k,)``: its token's. A row that stands for no token is of that of the row before it,
        or, where all places of that tile are taken, of the first one with room."""
        track = self.order[index.clamp(min=0), 0] if len(self) else torch.zeros_like(index)
        if len(self.tracks) > 1 and bool((index < 0).any()):
            last = int(track[index >= 0][0]) if bool((index >= 0).any()) else 0
            places = torch.tensor([len(one.tile.grid) for one in self.tracks])
            room = (places - track[index >= 0].bincount(minlength=len(places))).tolist()
            for row in range(len(index)):
                if index[row] >= 0:
                    last = int(track[row])
                    continue
                last = last if room[last] > 0 else next((one for one, left in enumerate(room) if left > 0), last)
                room[last] -= 1
                track[row] = last
        return track


@dataclass
class Strand:
    """One prompt's visual tokens in a sequence of tokens, as in the language model.

    order:   ``(n, 2)`` long, for each of them the place of its track in the journey's ``tracks`` and its row there.
    slots:   ``(n,)`` long, ascending, where they stand in the sequence now.
    entered: ``(total,)`` long, where they stood when they entered.
    """

    journey: Journey
    order: Tensor
    slots: Tensor
    entered: Tensor

    @classmethod
    def entering(cls, journey: Journey, slots: Tensor) -> Strand:
        """The tokens that entered, at these slots."""
        return cls(journey, journey.entered, slots, slots)

    def advance(
        self, scope: Scope, choose: Callable[[Group, Tensor], tuple[Taken, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Let ``choose`` select among the tokens of every group of this scope. It is given the group and its tokens'
        slots, and says what was taken, and the rows ``(k, dim)`` that are left of it.

        Gives the slots whose states these rows become, in their order, and the rows, a tensor for every group. Tokens
        that are in no group stay as they are.
        """
        changed, rows, order = [self.slots[:0]], [], [self.order[:0]]
        others = torch.ones_like(self.slots, dtype=torch.bool)
        for tracks in scoped(scope, self.journey.tracks):
            places = torch.tensor([place for place, track in enumerate(self.journey.tracks) if track in tracks])
            here, local = torch.ones_like(others), self.order
            if len(places) < len(self.journey.tracks):
                here = torch.isin(self.order[:, 0], places)
                local = torch.stack([torch.searchsorted(places, self.order[here, 0]), self.order[here, 1]], dim=1)
            group, slots = Group(self.journey, tracks, local), self.slots[here]
            taken, left = choose(group, slots)
            if bool((taken.selection.index < 0).any()):
                raise ValueError("a row stands for no token, and a sequence of tokens has no place for one")
            changed.append(slots[taken.selection.index.cpu().sort().values])
            order.append(torch.stack([places[group.order[:, 0]], group.order[:, 1]], dim=1))
            rows.append(left)
            others &= ~here
        together = torch.cat(changed)
        self.slots, by_slot = torch.cat([together, self.slots[others]]).sort()
        self.order = torch.cat([*order, self.order[others]])[by_slot]
        return together, rows


@dataclass(frozen=True)
class Taken:
    """What a group's selection comes to.

    chosen: for every track the places ``(its rows,)`` among its rows before, -1 for a row that stands for none.
    own:    for every track which of the ``k`` rows are its.
    """

    selection: Selection
    chosen: list[Tensor]
    own: list[Tensor]

    def rows(self, features: Tensor) -> Tensor:
        """What is left of the features ``(n, dim)`` that were chosen from: ``(k, dim)``, in the method's order."""
        return features[self.selection.index] if self.selection.features is None else self.selection.features

    def split(self, rows: Tensor) -> list[Tensor]:
        """Every track's own of the rows ``(k, dim)``."""
        return [rows] if len(self.own) == 1 else [rows[own.to(rows.device)] for own in self.own]


def scoped(scope: Scope, tracks: Sequence[Track]) -> Iterator[list[Track]]:
    """Those of a prompt's tracks that stand together in one selection of this scope, if there is anything to select.

    Special tokens belong to their picture, and to no tile.
    """
    groups: dict[int, list[Track]] = {}
    for place, track in enumerate(tracks):
        if scope != "tile":
            groups.setdefault(track.tile.picture if scope == "picture" else 0, []).append(track)
        elif track.number >= 0:
            groups[place] = [track]
    yield from (group for group in groups.values() if any(len(track) for track in group))


def followed(rows: Tensor, chosen: Tensor, instead: int = -1) -> Tensor:
    """The entries ``(n, ...)`` at ``chosen`` (k,), and ``instead`` at a row that stands for no token."""
    chosen = chosen.to(rows.device)
    if not len(rows):
        return rows.new_full((len(chosen), *rows.shape[1:]), instead)
    missing = (chosen < 0).view(-1, *[1] * (rows.ndim - 1))
    return rows[chosen.clamp(min=0)].masked_fill(missing, instead)


def checked(reducer: TokenReducer, step: Step, tokens: VisualTokens) -> Selection:
    """What the reducer selects. A mistake in a method must not become a wrong answer: raises ``ValueError`` for a
    selection that does not hold together."""
    selection = reducer.select(step, tokens)
    name, index = type(reducer).__name__, selection.index
    if index.dtype != torch.long or index.ndim != 1:
        raise ValueError(f"{name} selected with a {index.dtype} index of shape {tuple(index.shape)}: give (k,) long")
    if not tokens.adaptive and len(index) != tokens.keep:
        raise ValueError(f"{name} selected {len(index)} tokens where its count said {tokens.keep}")
    own = index if selection.features is None else index[index != -1]
    if len(own) and not (int(own.min()) >= 0 and int(own.max()) < len(tokens) and len(own.unique()) == len(own)):
        raise ValueError(f"{name} selected a token twice or outside 0..{len(tokens) - 1}: {index.tolist()}")
    if tokens.adaptive and tokens.bounds and not tokens.bounds[0] <= len(index) <= tokens.bounds[1]:
        raise ValueError(f"{name} selected {len(index)} tokens where its count said {tokens.bounds}")
    expected = (len(index), tokens.features.shape[-1])
    if selection.features is not None and tuple(selection.features.shape) != expected:
        raise ValueError(f"{name} returned features of shape {tuple(selection.features.shape)}, not {expected}")
    if selection.source is not None and len(selection.source) != len(tokens):
        raise ValueError(f"{name} returned a source of {len(selection.source)} entries for {len(tokens)} tokens")
    if selection.sight is not None and step.decoder_layer(tokens.span.geometry) is None:
        raise ValueError(f"{name} says who may attend to whom before the language model: only AtDecoder steps can")
    for what in ("size", "values"):
        given = getattr(selection, what)
        if given is not None and len(given) != len(index):
            raise ValueError(f"{name} returned {len(given)} {what} for {len(index)} rows")
    return selection


def _numbered(tracks: Sequence[Track], place: int) -> int:
    """Which of a span's tiles a track is, -1 for special tokens."""
    return -1 if tracks[place].number < 0 else sum(track.number >= 0 for track in tracks[:place])
