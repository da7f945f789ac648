"""Steps that see a whole picture or video, or all pictures of a prompt, at once: on every family that takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tokenreduce import reduce_tokens
from tokenreduce.attach.call import Call, placed
from tokenreduce.models.family import Picture, family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import (
    AtDecoder,
    AtEncoderOutput,
    AtProjector,
    Geometry,
    Keep,
    Scope,
    Selection,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.registry import MODELS
from tokenreduce.signals import DecoderAttention, EncoderAttention, EncoderHidden, Signal
from tokenreduce.testing import Identity, check_reducer
from tokenreduce.testing.checkpoints import ask, picture, recipes, video
from tokenreduce.testing.invariants import (
    counts_are_exact,
    dropping_equals_masking,
    equals_the_literal_sequence,
    neighbours_do_not_matter,
)
from tokenreduce.testing.wrapping import Wrapped

Checkpoint = Callable[[str], Path]
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in recipes()]
JOINT: tuple[Scope, ...] = ("picture", "sample")
SCOPES: tuple[Scope, ...] = ("tile", *JOINT)
T = TypeVar("T")
Name = tuple[int, ...]
SPECIAL: Name = (-1, -1, -1)
"""The name of newlines and class tokens."""


class Loaded:
    """A model and batches for it: of three prompts the first has one picture, the second none and the third two; and,
    where the model takes them, one has a video, the next a video and a picture, and the last none."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.model, self.processor = load(str(directory), attention=recipes()[name].attention)
        self.family = family_of(self.model, MODELS.usable())
        tall, wide, square = picture(0, 60, 40), picture(1, 30, 90), picture(2, 50, 50)
        self.batches = [ask(self.processor, [[wide], [], [square, tall]])]
        if recipes()[name].frames:
            films = [video(0, 4, 40, 60), video(1, 4, 40, 60)]
            images = [[], [square] if name != "smolvlm" else [], []]  # it has one input for frames and pictures
            self.batches.append(ask(self.processor, images, [films[:1], films[1:], []]))

    def encoded(self, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
        """What the model gives for all placeholders of every picture, and behind it what deeper layers add."""
        modalities = dict.fromkeys(one.modality for one in self.family.pictures(batch))
        with torch.no_grad():
            return [levels for modality in modalities for levels in self.family.encode(batch, modality)]

    def pictures(self, batch: Mapping[str, Tensor]) -> list[list[Picture]]:
        """Every prompt's pictures."""
        pictures = self.family.pictures(batch)
        return [[pictures[number] for number, _ in row] for row in placed(self.family, batch, pictures)]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[Loaded]:
    yield Loaded(request.param, checkpoint(request.param))


@dataclass(frozen=True)
class Best(TokenReducer):
    """Keeps the best tokens of everything that is seen together, and none of every other tile where the rest is
    enough."""

    scope: Scope = "picture"
    keep: Keep = 0.4
    at: type[Step] = AtProjector

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [self.at(keep=self.keep, scope=self.scope, sees=(EncoderHidden(),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        scores = tokens[EncoderHidden()].float().sum(-1)
        return Selection(tokens.best(scores - 1e3 * (tokens.tile % 2)))


@dataclass(frozen=True)
class Means(TokenReducer):
    """Makes rows of the means of tokens that lie a fixed number of places apart in everything that is seen together. A
    row stands for the first of its tokens, or for the second."""

    scope: Scope = "picture"
    keep: Keep = 0.4
    at: type[Step] = AtProjector

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [self.at(keep=self.keep, scope=self.scope)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        kept = torch.arange(tokens.keep)
        index = torch.where((kept % 2 == 1) & (kept + len(kept) < len(tokens)), kept + len(kept), kept)
        order = index.argsort()
        source = order.argsort()[torch.arange(len(tokens)) % len(kept)]
        return Selection(index[order], means(tokens.features, source, len(kept)), source)


@dataclass(frozen=True)
class Shuffled(TokenReducer):
    """Keeps some tokens in an order of its own."""

    scope: Scope = "picture"
    keep: Keep = 0.6
    ordered: bool = True

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(keep=self.keep, scope=self.scope, ordered=self.ordered)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.randperm(len(tokens), generator=tokens.generator(0))[: tokens.keep])


@dataclass(frozen=True)
class Emptied(Shuffled):
    """Shuffles once more, tile by tile, and takes away all of the prompt's first picture but for its crops."""

    again: bool = True

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        (first,) = super().steps(geometry)
        return [first, replace(first, keep=None, scope="tile", ordered=self.again)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if step.keep is not None:
            return super().select(step, tokens)
        (tile,) = tokens.span.tiles
        gone = tile.picture == 0 and tile.role != "crop"
        return Selection(torch.randperm(0 if gone else len(tokens), generator=tokens.generator(1)))


@dataclass(frozen=True)
class Inside(TokenReducer):
    """Drops and merges in two layers of the language model, behind a cut at the projector."""

    scope: Scope = "picture"
    before: Scope = "picture"

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [
            AtProjector(keep=0.8, scope=self.before),
            AtDecoder(layer=1, keep=0.6, scope=self.scope, sees=(DecoderAttention(0),)),
            AtDecoder(layer=2, keep=0.3, scope=self.scope),
        ]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if isinstance(step, AtProjector):
            return Selection(tokens.best(tokens.features.float().sum(-1)))
        if step.sees:
            return Selection(tokens.best(tokens[DecoderAttention(0)].mean(-1)[0]))
        return Means().select(step, tokens)


class Note(NamedTuple):
    """One selection."""

    step: Step
    tokens: VisualTokens
    selection: Selection
    signals: dict[Signal, list[Any]]


@dataclass(frozen=True)
class Logged(Wrapped):
    """Another reducer, with notes of what it was shown and what it selected."""

    log: list[Note] = field(default_factory=list)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        signals = {signal: list(tokens.each(signal)) for signal in step.sees}
        self.log.append(Note(step, tokens, self.inner.select(step, tokens), signals))
        return self.log[-1].selection


@dataclass(frozen=True)
class Named(TokenReducer):
    """Gives every token a name at the projector: its picture, tile and place, all counted from 1. Drops there and in
    two layers of the language model."""

    scope: Scope = "sample"

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        inside = [AtDecoder(layer=layer, keep=keep, scope=self.scope) for layer, keep in ((1, 0.6), (2, 0.3))]
        return [AtProjector(keep=0.7, scope="picture"), *inside]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        index = tokens.best(tokens.features.float().sum(-1))
        if isinstance(step, AtDecoder):
            return Selection(index)
        picture = torch.full_like(tokens.tile, tokens.span.tiles[0].picture)
        return Selection(index, values=torch.stack([picture, tokens.tile, tokens.place], dim=-1)[index] + 1)


def means(features: Tensor, source: Tensor, rows: int) -> Tensor:
    """The mean of the tokens that went into every row."""
    members = one_hot(source, rows).T.to(features.dtype)
    return members @ features / members.sum(-1, keepdim=True)


def reduced(loaded: Loaded, reducer: TokenReducer, batch: dict[str, Tensor]) -> tuple[list[Tensor], Any, Call]:
    """What enters the language model: every prompt's columns, and every picture's features."""
    attached = reduce_tokens(loaded.model, reducer)
    with attached as attachment, torch.no_grad(), Call(attachment, batch).current() as call:
        return *attachment.reduced(call, batch), call


def together(scope: Scope, pictures: Sequence[T]) -> list[list[T]]:
    """What of a prompt's pictures one joint selection is about."""
    return [list(pictures)] if scope == "sample" and pictures else [[one] for one in pictures]


def seen_together(scope: Scope, pictures: Mapping[int, Picture]) -> list[list[tuple[int, int]]]:
    """The picture's number and the placeholder of every token that each selection is about."""
    tiles = [
        [(number, place) for place in places.tolist()]
        for number, one in pictures.items()
        for places in torch.tensor(placeholders(one)).split([len(tile.grid) for tile in one.tiles])
    ]
    groups: dict[int, list[tuple[int, int]]] = {}
    for tile, own in enumerate(tiles):
        groups.setdefault({"tile": tile, "picture": own[0][0], "sample": 0}[scope], []).extend(own)
    return list(groups.values())


def placeholders(one: Picture) -> list[int]:
    """Where each of a picture's tokens stands among its placeholders, tile after tile."""
    return one.tokens.argsort(stable=True)[int((one.tokens < 0).sum()) :].tolist()


def with_special_ones(one: Picture, kept: Collection[int]) -> list[int]:
    """The placeholders that stay where these visual tokens do, newlines and class tokens of their lines included."""
    lines = set(one.lines[list(kept)].tolist())
    special = [place for place in (one.tokens < 0).nonzero()[:, 0].tolist() if int(one.lines[place]) in lines]
    return sorted([*kept, *special])


def numbered(one: Picture) -> list[Name]:
    """The tile and the place of each of a picture's tokens, tile after tile."""
    return [(tile, place) for tile, about in enumerate(one.tiles) for place in range(len(about.grid))]


# What is computed.


@pytest.mark.parametrize("scope", JOINT)
@pytest.mark.parametrize("toy", [Best, Means])
def test_a_joint_step_keeps_the_invariants(loaded: Loaded, toy: Any, scope: Scope) -> None:
    for batch in loaded.batches:
        check_reducer(toy(scope=scope), loaded.model, batch)
        for check in (equals_the_literal_sequence, dropping_equals_masking):
            check(toy(scope=scope, positions="original"), loaded.model, batch)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_inside_the_language_model_keeps_them_in_any_scope(loaded: Loaded, scope: Scope) -> None:
    for batch in loaded.batches:
        for check in (counts_are_exact, neighbours_do_not_matter, equals_the_literal_sequence):
            check(Inside(scope=scope), loaded.model, batch)
        equals_the_literal_sequence(Inside(scope=scope, before="tile", positions="original"), loaded.model, batch)


@pytest.mark.parametrize("scope", JOINT)
@pytest.mark.parametrize("toy", [Best, Means])
def test_rows_are_made_of_the_tokens_that_were_chosen(loaded: Loaded, toy: Any, scope: Scope) -> None:
    """By hand, from what the model gives for all placeholders: rows, their order, special tokens between them, and what
    deeper layers of the tower add."""
    for batch in loaded.batches:
        whole, reducer = loaded.encoded(batch), Logged(inner=toy(scope=scope))
        columns, features, call = reduced(loaded, reducer, batch)
        log = iter(reducer.log)
        for row, found in zip(call.rows, columns, strict=True):
            expected: list[int] = []
            for group in together(scope, row):
                selection = next(log).selection
                pictures = {number: call.pictures[number].picture for number, _ in group}
                (shown,) = seen_together("sample", pictures)
                homes = {shown[token]: row for row, token in enumerate(selection.index.tolist())}
                places = {
                    number: with_special_ones(one, [place for owner, place in homes if owner == number])
                    for number, one in pictures.items()
                }
                for level in range(len(features[group[0][0]])):
                    each = torch.stack([whole[number][level][place] for number, place in shown])
                    rows = each[selection.index]
                    if selection.features is not None:
                        rows = means(each, selection.sources(len(each)), len(rows))
                    for number, own in places.items():
                        left = [
                            rows[homes[number, place]] if (number, place) in homes else whole[number][level][place]
                            for place in own
                        ]
                        pairs = zip(features[number][level], left, strict=True)
                        assert all(torch.allclose(*pair, atol=1e-6) for pair in pairs)
                expected += [column for number, own in group for column in own[places[number]].tolist()]
            assert found.tolist() == expected


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_methods_own_order_lasts_to_the_prompt(loaded: Loaded, scope: Scope, ordered: bool) -> None:
    """Where it is declared, or where a picture is one tile without special tokens, whose places stay as they are."""
    for batch in loaded.batches:
        whole, reducer = loaded.encoded(batch), Logged(inner=Shuffled(scope=scope, ordered=ordered))
        columns, features, call = reduced(loaded, reducer, batch)
        log = iter(reducer.log)
        for row, found in zip(call.rows, columns, strict=True):
            pictures = {number: call.pictures[number].picture for number, _ in row}
            chosen: dict[int, list[int]] = {number: [] for number in pictures}
            for shown in seen_together(scope, pictures):
                for token in next(log).selection.index.tolist():
                    chosen[shown[token][0]].append(shown[token][1])
            expected: list[int] = []
            for number, own in row:
                one, kept = pictures[number], chosen[number]
                several = len(one.tiles) > 1 or bool((one.tokens < 0).any())
                order = iter(sorted(kept) if several and not ordered else kept)
                places = [next(order) if place in kept else place for place in with_special_ones(one, kept)]
                expected += own[places].tolist()
                for level, left in enumerate(features[number]):
                    assert torch.equal(left, whole[number][level][places])
            assert found.tolist() == expected
        for positions in ("original", "compact"):
            equals_the_literal_sequence(reducer.inner.with_positions(positions), loaded.model, batch)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_with_original_positions_tokens_are_in_raster_order(loaded: Loaded, scope: Scope, ordered: bool) -> None:
    for batch in loaded.batches:
        whole, reducer = loaded.encoded(batch), Shuffled(scope=scope, ordered=ordered, positions="original")
        columns, features, call = reduced(loaded, reducer, batch)
        for row, found in zip(call.rows, columns, strict=True):
            assert found.equal(found.sort().values)
            for number, own in row:
                for level, left in enumerate(features[number]):
                    assert torch.equal(left, whole[number][level][torch.isin(own, found)])
        dropping_equals_masking(reducer, loaded.model, batch)


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("scope", ["tile", "picture"])
def test_an_order_ends_with_its_tokens(loaded: Loaded, scope: Scope, again: bool) -> None:
    """A later step may leave nothing of a tile, or of a picture, whose tokens had an order."""
    for batch in loaded.batches:
        columns, features, _ = reduced(loaded, Emptied(scope=scope, again=again), batch)
        whole = loaded.encoded(batch)
        assert sum(map(len, columns)) == sum(len(levels[0]) for levels in features)
        assert all(len(levels) == len(own) for levels, own in zip(features, whole, strict=True))
        equals_the_literal_sequence(Emptied(scope=scope, again=again, positions="original"), loaded.model, batch)


@pytest.mark.parametrize("scope", JOINT)
def test_records_say_in_which_row_of_which_tile_a_token_is(loaded: Loaded, scope: Scope) -> None:
    for batch in loaded.batches:
        reducer = Logged(inner=Means(scope=scope))
        with reduce_tokens(loaded.model, reducer) as attachment, torch.no_grad():
            loaded.model(**batch)
        log = iter(reducer.log)
        for images in (sample.images for sample in attachment.samples):
            for group in together(scope, sorted({image.picture for image in images})):
                selection = next(log).selection
                tiles = [tile for tile, image in enumerate(images) if image.picture in group]
                shown = [(tile, token) for tile in tiles for token in range(len(images[tile].grid))]
                rows = [shown[token] for token in selection.index.tolist()]
                owners = [tile for tile, _ in rows]
                sources = selection.sources(len(shown)).tolist()
                for tile in tiles:
                    (step,) = images[tile].steps
                    own = [row for row, (owner, _) in zip(sources, shown, strict=True) if owner == tile]
                    into = tuple(owners[row] for row in own)
                    assert step.merged
                    assert step.index == tuple(token for owner, token in rows if owner == tile)
                    assert step.source == tuple(owners[:row].count(owners[row]) for row in own)
                    assert step.into == (into if {*into} != {tile} else ())


def test_of_a_video_whole_frames_may_go(loaded: Loaded) -> None:
    """The best of everything are kept, however they fall on tiles: of every other tile nothing."""
    for batch in loaded.batches:
        with reduce_tokens(loaded.model, Best()) as attachment, torch.no_grad():
            loaded.model(**batch)
        for sample in attachment.samples:
            for number in {image.picture for image in sample.images}:
                own = [image for image in sample.images if image.picture == number]
                assert sum(len(image.kept) for image in own) == int(0.4 * sum(len(image.grid) for image in own))
                assert not any(image.kept for image in own[1::2])


# What is shown.


@pytest.mark.parametrize("scope", JOINT)
def test_what_is_shown_is_what_the_tiles_show(loaded: Loaded, scope: Scope) -> None:
    """All that steps on single tiles are shown, one tile after the other."""
    seen = (EncoderHidden(), EncoderAttention())
    sites = (AtProjector(keep=1.0, scope=one, sees=seen) for one in ("tile", scope))
    single, joint = (Logged(inner=Identity(site=site)) for site in sites)
    for batch in loaded.batches:
        for reducer in (single, joint):
            reducer.log.clear()
            with reduce_tokens(loaded.model, reducer), torch.no_grad():
                loaded.model(**batch)
        alone, log = iter(single.log), iter(joint.log)
        for row in loaded.pictures(batch):
            for group in together(scope, list(enumerate(row))):
                _, tokens, _, signals = next(log)
                described = tuple(tile.described(place) for place, one in group for tile in one.tiles)
                own = [next(alone) for _ in described]
                assert tokens.span.tiles == described
                assert tokens.span.times == tuple(tile.time for tile in described)
                assert tokens.span.entered == tokens.span.current == len(tokens)
                assert tokens.index.tolist() == list(range(len(tokens)))
                assert tokens.tile.tolist() == [tile for tile, one in enumerate(own) for _ in range(len(one.tokens))]
                for name in ("features", "place", "coordinates"):
                    assert torch.equal(getattr(tokens, name), torch.cat([getattr(one.tokens, name) for one in own]))
                for tile, place, at in zip(tokens.tile, tokens.place, tokens.coordinates, strict=True):
                    about = described[tile]
                    down, along = divmod(int(place), about.grid.width)
                    assert at.tolist() == [about.row + down, about.column + along]
                assert [*map(torch.Tensor.tolist, signals[EncoderHidden()])] == [
                    one.signals[EncoderHidden()][0].tolist() for one in own
                ]
                for view, one in zip(signals[EncoderAttention()], own, strict=True):
                    assert torch.equal(view.mean(), one.signals[EncoderAttention()][0].mean())
        assert not list(alone) and not list(log)


@pytest.mark.parametrize("scope", SCOPES)
def test_inside_the_language_model_tokens_know_where_they_are_from(loaded: Loaded, scope: Scope) -> None:
    """Behind a cut before it and one inside it, and with newlines and class tokens among them."""
    for batch in loaded.batches:
        reducer = Logged(inner=Named(scope=scope))
        with reduce_tokens(loaded.model, reducer) as attachment, torch.no_grad():
            loaded.model(**batch)
        inside = [note for note in reducer.log if isinstance(note.step, AtDecoder)]
        entering, later = iter(inside[: len(inside) // 2]), iter(inside[len(inside) // 2 :])
        for sample, row in zip(attachment.samples, loaded.pictures(batch), strict=True):
            tiles: list[Name] = [(place, tile) for place, one in enumerate(row) for tile in range(len(one.tiles))]
            entered: dict[Any, list[Name]] = {}  # as they stand in the prompt
            for place, one in enumerate(row):
                names = dict(zip(placeholders(one), numbered(one), strict=True))
                images = [image for image in sample.images if image.picture == place]
                kept = [each for each, (tile, token) in names.items() if token in images[tile].steps[0].index]
                for each in with_special_ones(one, kept):
                    name = (place, *names[each]) if each in names else SPECIAL
                    if name != SPECIAL or scope != "tile":
                        key = {"tile": name[:2], "picture": (place,), "sample": ()}[scope]
                        entered.setdefault(key, []).append(name)
            for key, own in sorted(entered.items()):
                seen = [tile for tile in tiles if tile[: len(key)] == key]
                _, tokens, selection, _ = next(entering)
                assert named(tokens, seen) == own == given(tokens)
                described = [row[place].tiles[tile].described(place) for place, tile in seen]
                assert list(tokens.span.tiles) == described
                behind = next(later).tokens
                assert named(behind, seen) == given(behind) == [own[token] for token in selection.index.tolist()]
                assert list(behind.span.tiles) == described
                assert torch.equal(behind.index, selection.index)
                assert (behind.span.entered, behind.span.current) == (len(own), len(behind))
        assert not list(entering) and not list(later)


def named(tokens: VisualTokens, tiles: Sequence[Name]) -> list[Name]:
    """The names of tokens by what they are told of themselves; ``tiles`` are those that are seen."""
    told = zip(tokens.tile.tolist(), tokens.place.tolist(), tokens.coordinates.tolist(), strict=True)
    return [(*tiles[tile], place) if tile >= 0 else (place, *at) for tile, place, at in told]


def given(tokens: VisualTokens) -> list[Name]:
    """The names that they were given, one less than was written so that of special tokens nothing was."""
    assert tokens.values is not None
    return [tuple(name) for name in (tokens.values - 1).tolist()]


# Between the vision encoder and the projector.


@pytest.mark.parametrize("toy", [Best, Means])
def test_a_whole_picture_is_seen_at_the_encoders_output(loaded: Loaded, toy: Any) -> None:
    """Where the family hosts that. All pictures of a prompt are not, for images and videos are encoded apart."""
    if not loaded.family.hosts(AtEncoderOutput):
        with pytest.raises(ValueError, match="cannot host"), reduce_tokens(loaded.model, toy(at=AtEncoderOutput)):
            pass
        return
    for batch in loaded.batches:
        check_reducer(toy(at=AtEncoderOutput), loaded.model, batch)
        kept = []
        for at in (AtEncoderOutput, AtProjector):  # scores are of the encoder's states at both
            with reduce_tokens(loaded.model, Best(at=at)) as attachment, torch.no_grad():
                loaded.model(**batch)
            kept.append([[image.kept for image in sample.images] for sample in attachment.samples])
        assert kept[0] == kept[1]
    refused = pytest.raises(ValueError, match="they are together AtProjector")
    with refused, reduce_tokens(loaded.model, toy(at=AtEncoderOutput, scope="sample")):
        pass
