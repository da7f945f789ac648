"""Tokens on their way through steps: what follows them, and what one step leaves to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import reduce_tokens
from tokenreduce.chain import Chain
from tokenreduce.passage import Group, Journey, Strand, Taken, Track, scoped
from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
    Count,
    Geometry,
    Grid,
    Scope,
    Selection,
    Span,
    Step,
    Tile,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.testing import prompts

GEOMETRY = Geometry(encoder_layers=4, decoder_layers=4, feature_layer=2, class_token=False)
TILES = (Tile(Grid(2, 3)), Tile(Grid(1, 4), "crop"), Tile(Grid(2, 2), picture=1))
SCOPES: tuple[Scope, ...] = ("tile", "picture", "sample")
Choose = Callable[[VisualTokens], Selection]


@dataclass(frozen=True)
class Asked(TokenReducer):
    """Selects whatever it is told to."""

    choose: Choose

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector()]

    def count(self, step: Step, span: Span) -> Count:
        return None

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return self.choose(tokens)


def ask(journey: Journey, scope: Scope, choose: Choose, member: int = 0) -> None:
    """Let every group of a scope be chosen from before the language model."""
    for tracks in scoped(scope, journey.tracks):
        group = Group(journey, tracks)
        group.select(Asked(choose), AtProjector(scope=scope, member=member), torch.zeros(len(group), 2), GEOMETRY)


def enter(journey: Journey, special: int = 1) -> Strand:
    """Let what is left enter the language model behind two tokens of text: a picture after the other, behind each so
    many special tokens."""
    order: list[tuple[int, int]] = []
    pictures = sorted({track.tile.picture for track in journey.tiles})
    for picture in pictures:
        journey.tracks.append(Track.special(picture, special))
        own = [place for place, track in enumerate(journey.tracks) if track.tile.picture == picture]
        order += [(place, row) for place in own for row in range(len(journey.tracks[place]))]
    journey.enter(torch.tensor(order))
    return Strand.entering(journey, torch.arange(len(order)) + 2)


def cut(strand: Strand, scope: Scope, choose: Choose, member: int = 0) -> None:
    """Let every group of a scope be chosen from inside it."""

    def chosen(group: Group, slots: Tensor) -> tuple[Taken, Tensor]:
        features = torch.zeros(len(group), 2)
        taken = group.select(Asked(choose), AtDecoder(layer=1, scope=scope, member=member), features, GEOMETRY)
        return taken, taken.rows(features)

    strand.advance(scope, chosen)


def named(tokens: VisualTokens) -> Tensor:
    """A number for every token that no other has: picture, tile and place."""
    pictures = torch.tensor([tile.picture for tile in tokens.span.tiles])[tokens.tile]
    columns = torch.tensor([len(tile.grid) for tile in tokens.span.tiles])[tokens.tile]
    return pictures * 100 + columns * 10 + tokens.place


def named_at_first(tokens: VisualTokens) -> Selection:
    """Keeps everything, with its names."""
    return Selection(torch.arange(len(tokens)), values=named(tokens))


def every_other(tokens: VisualTokens) -> Selection:
    """Keeps every other token, the last one first, if they have their names."""
    visual = tokens.tile >= 0
    assert tokens.values is not None
    assert torch.equal(tokens.values[visual], named(tokens)[visual])
    assert not tokens.values[~visual].any()
    return Selection(torch.arange(len(tokens)).flip(0)[::2])


def test_values_follow_their_tokens_to_the_end() -> None:
    journey = Journey(TILES)
    ask(journey, "tile", named_at_first)
    for scope in SCOPES:
        ask(journey, scope, every_other)
    strand = enter(journey, special=2)
    for scope in reversed(SCOPES):
        cut(strand, scope, every_other)
    assert sum(len(track) for track in journey.tiles) > 0


def test_values_of_rows_that_stand_for_no_token_are_zeros() -> None:
    journey = Journey(TILES[:1])
    flags = torch.tensor([True] * 6)
    ask(journey, "tile", lambda tokens: Selection(torch.arange(6), values=flags))
    none = Selection(torch.tensor([-1, 4]), torch.zeros(2, 2), torch.full((6,), 1))
    ask(journey, "tile", lambda tokens: none)
    seen: list[Tensor | None] = []
    ask(journey, "tile", lambda tokens: seen.append(tokens.values) or tokens.everything())  # type: ignore[func-returns-value]
    assert seen[0] is not None and seen[0].tolist() == [False, True]


def carried(journey: Journey | Strand, scope: Scope, carry: Any = None, member: int = 0) -> list[Any]:
    """What the next step of a member finds, group by group; and what it carries itself."""
    found: list[Any] = []

    def choose(tokens: VisualTokens) -> Selection:
        found.append(tokens.carried)
        return tokens.everything(carry=None if carry is None else f"{carry}{len(found)}")

    (cut if isinstance(journey, Strand) else ask)(journey, scope, choose, member)  # type: ignore[arg-type]
    return found


def test_a_row_without_a_token_stays_with_the_row_before_it_while_that_tile_has_room() -> None:
    journey = Journey(TILES)

    def fill_the_second_tile(tokens: VisualTokens) -> Selection:
        index = torch.tensor([0, -1, 6, 7, 8, 9, -1, -1] if len(tokens) == 10 else [0, -1])
        return Selection(index, torch.zeros(len(index), 2), torch.full((len(tokens),), -1))

    ask(journey, "picture", fill_the_second_tile)
    assert [track.token.tolist() for track in journey.tracks] == [[0, -1, -1, -1], [0, 1, 2, 3], [0, -1]]


def test_what_was_carried_is_found_by_the_next_step() -> None:
    journey = Journey(TILES)
    assert carried(journey, "tile", "tile") == [None, None, None]
    assert carried(journey, "tile", "again") == ["tile1", "tile2", "tile3"]
    assert carried(journey, "picture", "picture") == [["again1", "again2"], "again3"]
    assert carried(journey, "sample") == [["picture1", "picture2"]]
    assert carried(journey, "sample", "sample") == [None]
    assert carried(journey, "tile", "tile") == ["sample1"] * 3


@pytest.mark.parametrize(
    ("before", "inside", "expected"),
    [
        ("sample", "sample", ["out1"]),
        ("sample", "tile", ["out1"] * 3),
        ("picture", "sample", [["out1", "out2"]]),
        ("picture", "picture", ["out1", "out2"]),
        ("tile", "sample", [["out1", "out2", "out3"]]),
        ("tile", "tile", ["out1", "out2", "out3"]),
    ],
)
def test_inside_the_language_model_too(before: Scope, inside: Scope, expected: list[Any]) -> None:
    journey = Journey(TILES)
    carried(journey, before, "out")
    strand = enter(journey)
    assert carried(strand, inside, "in") == expected
    last = [f"in{number + 1}" for number in range(len(expected))]
    assert carried(strand, "sample") == ([last] if len(last) > 1 else last)
    assert carried(strand, "sample") == [None]


def test_members_of_a_chain_find_only_their_own() -> None:
    journey = Journey(TILES[:2])
    one, other = torch.arange(6), torch.arange(6) * 10.0
    ask(journey, "tile", lambda tokens: Selection(torch.arange(len(tokens)), values=one[: len(tokens)], carry="one"))
    seen: list[Any] = []

    def look(tokens: VisualTokens) -> Selection:
        seen.append((tokens.values, tokens.carried))
        return Selection(torch.arange(1, len(tokens)), values=other[1 : len(tokens)], carry="other")

    ask(journey, "tile", look, member=1)
    assert seen == [(None, None)] * 2
    found: list[VisualTokens] = []
    for member in (0, 1):
        ask(journey, "picture", lambda tokens: found.append(tokens) or tokens.everything(), member)  # type: ignore[func-returns-value]
    first, second = found
    assert first.values is not None and first.values.tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert second.values is not None and second.values.tolist() == [10, 20, 30, 40, 50, 10, 20, 30]
    assert (first.carried, second.carried) == (["one"] * 2, ["other"] * 2)


@dataclass(frozen=True)
class Remembering(TokenReducer):
    """Keeps the best by scores that it computes once and gives along, and carries how often it has been asked."""

    layers: tuple[int, ...]
    sign: int = 1
    scope: Scope | None = None

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        before = [] if self.scope is None else [AtProjector(keep=0.8, scope=self.scope)]
        return [*before, *(AtDecoder(layer=layer, keep=0.7) for layer in self.layers)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        scores = self.sign * tokens.features.float().sum(-1) if tokens.values is None else tokens.values
        asked = tokens.carried if isinstance(tokens.carried, list) else [tokens.carried or 0]
        index = tokens.best(scores, min(len(tokens), tokens.keep))
        return Selection(index, values=scores[index], carry=asked[0] + 1)


@pytest.mark.parametrize("scope", ["tile", "picture", "sample"])
def test_a_member_finds_its_own_behind_a_step_of_another(llava: Model, scope: Scope) -> None:
    """What the first member has from the projector is there in layer 3, though the second acts in between."""
    seen: list[tuple[int, Any, bool]] = []

    class Watched(Remembering):
        def select(self, step: Step, tokens: VisualTokens) -> Selection:
            seen.append((step.decoder_layer(tokens.span.geometry) or 0, tokens.carried, tokens.values is not None))
            return super().select(step, tokens)

    chain = Chain(reducers=(Watched(layers=(3,), scope=scope), Watched(layers=(1, 2), sign=-1)))
    with reduce_tokens(llava, chain), torch.no_grad():
        llava(**prompts(llava, [2]))
    found = [1, 1] if scope != "sample" else 1
    assert seen == [
        *[(0, None, False)] * (2 if scope != "sample" else 1),
        (1, None, False),
        (2, 1, True),
        (3, found, True),
    ]


@dataclass(frozen=True)
class Promising(Asked):
    """Promises a count besides."""

    promise: Any

    def count(self, step: Step, span: Span) -> Count:
        return self.promise


@pytest.mark.parametrize(
    ("promise", "message"),
    [
        (3, "Promising selected 14 tokens where its count said 3"),
        ((3, 13), r"Promising selected 14 tokens where its count said \(3, 13\)"),
        ((15, 20), r"Promising selected 14 tokens where its count said \(15, 20\)"),
        ((20, 15), r"the count of Promising said \(20, 15\): give a number of tokens, a range"),
        (-1, "the count of Promising said -1: give a number of tokens, a range"),
        (2.5, "the count of Promising said 2.5: give a number of tokens, a range"),
        ((1, 2, 3), r"the count of Promising said \(1, 2, 3\): give a number of tokens, a range"),
    ],
)
def test_a_count_is_held_to(promise: Any, message: str) -> None:
    group = Group(journey := Journey(TILES), journey.tracks)
    reducer, step = Promising(choose=VisualTokens.everything, promise=promise), AtProjector(scope="sample")
    with pytest.raises(ValueError, match=message):
        group.select(reducer, step, torch.zeros(14, 2), GEOMETRY)


@pytest.mark.parametrize(("promise", "bounds"), [((3, 14), (3, 14)), (14, (14, 14)), (None, None)])
def test_a_method_is_told_its_bounds(promise: Count, bounds: tuple[int, int] | None) -> None:
    group, told = Group(journey := Journey(TILES), journey.tracks), []

    def choose(tokens: VisualTokens) -> Selection:
        told.append((tokens.bounds, tokens.adaptive))
        return tokens.everything()

    reducer, step = Promising(choose=choose, promise=promise), AtProjector(scope="sample")
    taken = group.select(reducer, step, torch.zeros(14, 2), GEOMETRY)
    assert told == [(bounds, promise != 14)]
    assert len(taken.selection.index) == 14
