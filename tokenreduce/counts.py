"""How many visual tokens a reducer leaves, before anything is computed: how many enter the language model, and how many
every layer of it sees. Budgets are solved on this, and an engine that sizes a prompt first needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenreduce.reducer import Geometry, Scope, Span, Step, Tile, TokenReducer


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


def entering(reducer: TokenReducer, geometry: Geometry, layout: Layout) -> int:
    """How many visual tokens of a prompt enter the language model, special ones included.

    Raises ``AdaptiveError`` where that is known only after a model has run.
    """
    before = [step for step in reducer.steps(geometry) if step.decoder_layer(geometry) is None]
    groups = [_Group([tile], len(tile.grid)) for tile in layout.tiles]
    for step in before:
        groups = _together(step.scope, groups)
        for group in groups:
            group.reduce(reducer, step, geometry)
    if not all(group.known for group in groups):
        raise _adaptive(reducer)
    left = sum(group.current for group in groups)
    return left + (layout.special if left else 0)


def layer_counts(reducer: TokenReducer, geometry: Geometry, layout: Layout) -> tuple[int, ...]:
    """How many visual tokens every layer of the language model takes in, ``(decoder layers,)``.

    Raises ``AdaptiveError`` where that is known only after a model has run.
    """
    entered = entering(reducer, geometry, layout)
    inside: dict[int, list[Step]] = {}
    for step in reducer.steps(geometry):
        if (layer := step.decoder_layer(geometry)) is not None:
            inside.setdefault(layer, []).append(step)
    if 0 in inside:
        raise ValueError(f"{type(reducer).__name__} would drop tokens before decoder layer 0")
    counts, current = [], entered
    for layer in range(geometry.decoder_layers):
        for step in inside.get(layer, ()):
            if current:
                if step.scope != "sample" and len(layout.tiles) > 1:
                    raise _adaptive(reducer)  # what is left of each picture by then is the pictures' affair
                least, current = bounds(reducer, step, Span(geometry, layout.tiles, entered, current))
                if least < current:
                    raise _adaptive(reducer)
        counts.append(current)
    return tuple(counts)


@dataclass
class _Group:
    """Tiles of one scope, how many of their tokens are left at the most, and whether that is known exactly."""

    tiles: list[Tile]
    current: int
    known: bool = True

    @property
    def entered(self) -> int:
        return sum(len(tile.grid) for tile in self.tiles)

    def reduce(self, reducer: TokenReducer, step: Step, geometry: Geometry) -> None:
        """Do what a step does. An adaptive step before it does no harm where it says how many it leaves in the end."""
        if not self.current:
            return
        least, most = bounds(reducer, step, Span(geometry, tuple(self.tiles), self.entered, self.current))
        self.known = least == most and (self.known or most != self.current)
        self.current = most
        if step.resizes and most:
            (tile,) = self.tiles
            self.tiles = [replace(tile, grid=tile.grid.fit(most))]
            self.current = self.entered


def bounds(reducer: TokenReducer, step: Step, span: Span) -> tuple[int, int]:
    """How many tokens a step leaves of a span, at the least and at the most."""
    count = reducer.count(step, span)
    if count is None:
        return 0, span.current
    return (count, count) if isinstance(count, int) else count


def _together(scope: Scope, groups: Sequence[_Group]) -> list[_Group]:
    """The groups of tiles that a step of this scope acts on. How many tokens a joint selection leaves of each tile is
    not known before."""
    if scope == "tile":
        return [
            group if len(group.tiles) == 1 else _Group([tile], len(tile.grid), known=False)
            for group in groups
            for tile in group.tiles
        ]
    joined: dict[int, _Group] = {}
    for group in groups:
        key = group.tiles[0].picture if scope == "picture" else 0
        other = joined.setdefault(key, _Group([], 0))
        other.tiles += group.tiles
        other.current += group.current
        other.known &= group.known
    return list(joined.values())


def _adaptive(reducer: TokenReducer) -> AdaptiveError:
    return AdaptiveError(
        f"{type(reducer).__name__} decides by the picture how many tokens it keeps, so it cannot be held to a budget"
    )
