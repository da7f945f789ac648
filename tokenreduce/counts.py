"""How many visual tokens a reducer leaves, before anything is computed: how many enter the language model, and how many
every layer of it sees. Budgets are solved on this, and an engine that sizes a prompt first needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenreduce.reducer import Count, Geometry, Scope, Span, Step, Tile, TokenReducer


class AdaptiveError(ValueError):
    """The reducer decides by what it sees how many tokens it keeps, so no count is known before a model has run."""


@dataclass(frozen=True)
class Layout:
    """A prompt as it is before anything is computed.

    tiles:   those of its pictures, as they enter.
    special: how many tokens besides stand at its placeholders, such as newlines. All of them count as long as any
             visual token is left, though some families drop theirs line by line.
    text:    how many other tokens it has.
    """

    tiles: tuple[Tile, ...]
    special: int = 0
    text: int = 0

    @property
    def visual(self) -> int:
        return sum(len(tile.grid) for tile in self.tiles) + self.special


def promised(reducer: TokenReducer, step: Step, span: Span) -> Count:
    """What the reducer's ``count`` says. Raises ``ValueError`` unless that is a number of tokens, a range or None."""
    match reducer.count(step, span):
        case None:
            return None
        case int(count) if count >= 0:
            return count
        case int(least), int(most) if 0 <= least <= most:
            return least, most
        case other:
            raise ValueError(
                f"the count of {type(reducer).__name__} said {other!r}: give a number of tokens, a range (least, most) "
                "of them, or None"
            )


def bounds(reducer: TokenReducer, step: Step, span: Span) -> tuple[int, int]:
    """How many tokens a step leaves of a span, at the least and at the most."""
    count = promised(reducer, step, span)
    if count is None:
        return 0, span.current
    return (count, count) if isinstance(count, int) else count


def entering(reducer: TokenReducer, geometry: Geometry, layout: Layout) -> int:
    """How many visual tokens of a prompt enter the language model, special ones included.

    Raises ``AdaptiveError`` where that is known only after a model has run.
    """
    return _known(_entering(reducer, geometry, layout), reducer)


def layer_counts(reducer: TokenReducer, geometry: Geometry, layout: Layout) -> tuple[int, ...]:
    """How many visual tokens every layer of the language model takes in, ``(decoder layers,)``.

    Raises ``AdaptiveError`` where that is known only after a model has run.
    """
    groups, several = _entering(reducer, geometry, layout), len({tile.picture for tile in layout.tiles}) > 1
    inside: dict[int, list[Step]] = {}
    for step in reducer.steps(geometry):
        if (layer := step.decoder_layer(geometry)) is not None:
            inside.setdefault(layer, []).append(step)
    if 0 in inside:
        raise ValueError(f"{type(reducer).__name__} would drop tokens before decoder layer 0")
    counts = []
    for layer in range(geometry.decoder_layers):
        for step in inside.get(layer, ()):
            if any(len(_parts(step.scope, group)) > 1 for group in groups):
                raise _adaptive(reducer)  # how many of each part are there was another step's affair
            if step.scope == "picture" and several and layout.special:
                raise _adaptive(reducer)  # nor is it known which picture's the special tokens are
            groups = [group.reduced(reducer, step, geometry) for group in _together(step.scope, groups)]
        counts.append(_known(groups, reducer))
    return tuple(counts)


@dataclass
class _Group:
    """Tiles that are selected from together: how many tokens of theirs entered, and how many are left at the least and
    at the most. One without tiles is of special tokens."""

    tiles: list[Tile]
    entered: int
    least: int
    most: int

    @classmethod
    def whole(cls, tiles: list[Tile], least: int | None = None) -> _Group:
        """Tiles of which all tokens may be left; by default they are."""
        total = sum(len(tile.grid) for tile in tiles)
        return cls(tiles, total, total if least is None else least, total)

    def joined(self, other: _Group) -> _Group:
        """This group and another as one."""
        ends = (self.entered + other.entered, self.least + other.least, self.most + other.most)
        return _Group(self.tiles + other.tiles, *ends)

    def reduced(self, reducer: TokenReducer, step: Step, geometry: Geometry) -> _Group:
        """What a step leaves of it. An adaptive step before it does no harm where it says how many it leaves in the
        end, whatever there is."""
        if not self.tiles or not self.most:
            return self
        ends = (Span(geometry, tuple(self.tiles), self.entered, left) for left in (max(1, self.least), self.most))
        (least, _), (_, most) = (bounds(reducer, step, span) for span in ends)
        if step.resizes and most:
            (tile,) = self.tiles
            return _Group.whole([replace(tile, grid=tile.grid.fit(most))])
        return replace(self, least=least, most=most)


def _entering(reducer: TokenReducer, geometry: Geometry, layout: Layout) -> list[_Group]:
    """What enters the language model."""
    groups = [_Group.whole([tile]) for tile in layout.tiles]
    for step in reducer.steps(geometry):
        if step.decoder_layer(geometry) is None:
            groups = [group.reduced(reducer, step, geometry) for group in _together(step.scope, groups)]
    if _known(groups, reducer) and layout.special:
        groups.append(_Group([], layout.special, layout.special, layout.special))
    return [replace(group, entered=group.most) for group in groups]


def _known(groups: Sequence[_Group], reducer: TokenReducer) -> int:
    """How many tokens are left of all groups. Raises ``AdaptiveError`` where that is not known."""
    if any(group.least != group.most for group in groups):
        raise _adaptive(reducer)
    return sum(group.most for group in groups)


def _parts(scope: Scope, group: _Group) -> list[list[Tile]]:
    """The tiles of a group that a step of this scope sees together."""
    parts: dict[int, list[Tile]] = {}
    for number, tile in enumerate(group.tiles):
        parts.setdefault({"tile": number, "picture": tile.picture, "sample": 0}[scope], []).append(tile)
    return list(parts.values())


def _together(scope: Scope, groups: Sequence[_Group]) -> list[_Group]:
    """The groups of tiles that a step of this scope acts on. How many tokens a joint selection left of each of its
    parts is not known."""
    apart: list[_Group] = []
    for group in groups:
        parts = _parts(scope, group)
        apart += [group] if len(parts) <= 1 else [_Group.whole(part, least=0) for part in parts]
    joined: dict[int, _Group] = {}
    for number, group in enumerate(apart):
        picture = (group.tiles or apart[0].tiles)[0].picture  # special tokens stand last
        key = {"tile": number, "picture": picture, "sample": 0}[scope]
        joined[key] = joined[key].joined(group) if key in joined else group
    return list(joined.values())


def _adaptive(reducer: TokenReducer) -> AdaptiveError:
    return AdaptiveError(
        f"{type(reducer).__name__} decides by the picture how many tokens it keeps, so it cannot be held to a budget"
    )
