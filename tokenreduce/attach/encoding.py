"""The pictures of a call on their way through the vision tower and the projector, up to the language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.attach import taps
from tokenreduce.attach.call import Call, placed
from tokenreduce.attach.hooks import Hook
from tokenreduce.models.family import EncodedTile, Inputs, Modality, ModelFamily, Picture
from tokenreduce.passage import ImageReduction, Journey, Track


@dataclass(eq=False)
class ReducedTile:
    """One tile on its way.

    tile:     what it was; encoded: how many patches the vision tower sees in its place; held: how many it holds now.
    track:    its tokens; journey: those of its prompt.
    patches:  ``(k,)`` or ``(k, group)`` where theirs stand in what the tower gives now, which merging in it renumbers.
    features: ``(k, dim)`` at the projector, and behind them what deeper layers add.
    encoding: the run of the vision tower that it was in.
    """

    tile: EncodedTile
    track: Track
    journey: Journey
    encoded: int
    patches: Tensor
    held: int
    features: tuple[Tensor, ...] = ()
    encoding: Encoding | None = None

    def reduction(self, track: Track) -> ImageReduction:
        """What was done to it on some way."""
        about = track.tile
        return ImageReduction(self.tile.grid, tuple(track.steps), self.encoded, about.role, about.picture, about.time)

    def places(self) -> Tensor:
        """A token's place for every row ``(k,)``: its own, and the first free ones for rows without a token.

        Raises ``ValueError`` where more rows are left than the tile has places in the prompt.
        """
        token, most = self.track.token, len(self.tile.grid)
        if len(token) > most:
            name = type(self.encoding.call.attachment.reducer).__name__ if self.encoding else "the reducer"
            raise ValueError(
                f"{name} leaves {len(token)} rows of a tile that has {most} places in the prompt: keep at most {most}"
            )
        homeless = token < 0
        if not bool(homeless.any()):
            return token
        free = torch.ones(most, dtype=torch.bool)
        free[token[~homeless]] = False
        places = token.clone()
        places[homeless] = free.nonzero()[: int(homeless.sum()), 0]
        return places


@dataclass(eq=False)
class ReducedPicture:
    """One image or video on its way.

    row:    the prompt that it belongs to.
    packed: the features ``(placeholders, dim)`` at all its placeholders, before the steps behind the projector.
    order:  ``(rows, 2)`` long, the tile and the row of every row in the order of the method, where that is to last.
    """

    picture: Picture
    row: int
    tiles: list[ReducedTile]
    packed: tuple[Tensor, ...] = ()
    order: Tensor | None = None

    def left(self, raster: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What is left of it in the prompt, in raster order even against a method's own if ``raster``.

        The places among its placeholders ``(k,)``; the tile and the row of that tile that stand there ``(k, 2)``, -1
        and a number for special tokens; and their features, none where the picture was not encoded.
        """
        rows = [torch.arange(len(tile.track)) for tile in self.tiles]
        owners = torch.cat([torch.full_like(row, number) for number, row in enumerate(rows)])
        entries = torch.stack([owners, torch.cat(rows)], dim=1)
        homes = self._homes()
        places = torch.cat([home[tile.places()] for home, tile in zip(homes, self.tiles, strict=True)])
        levels = [torch.cat(level) for level in zip(*(tile.features for tile in self.tiles), strict=True)]
        own = torch.arange(len(places))
        if self.order is not None:
            starts = torch.tensor([0, *map(len, rows)]).cumsum(0)
            own = starts[self.order[:, 0]] + self.order[:, 1]
        special = (self.picture.tokens < 0) & torch.isin(self.picture.lines, self.picture.lines[places])
        extra = special.nonzero()[:, 0]
        if raster or (self.order is None and (len(self.tiles) > 1 or len(extra))):
            own = places.argsort()
        slots = torch.cat([places.sort().values, extra]).argsort()
        order = torch.cat([own, len(places) + torch.arange(len(extra))])[slots]
        places = torch.cat([places, extra])[order]
        numbered = torch.stack([torch.full_like(extra, -1), torch.arange(len(extra))], dim=1)
        entries = torch.cat([entries, numbered])[order]
        if len(extra):
            levels = [torch.cat([level, whole[extra]]) for level, whole in zip(levels, self.packed, strict=True)]
        if not torch.equal(order, torch.arange(len(order))):
            levels = [level[order.to(level.device)] for level in levels]
        return places, entries, tuple(levels)

    def unpack(self, packed: tuple[Tensor, ...], shortened: bool) -> None:
        """Give every tile the features of its tokens, out of what stands at the placeholders ``(placeholders, dim)``;
        ``shortened`` where that holds the one tile's remaining rows alone."""
        self.packed = packed
        for home, tile in zip(self._homes(), self.tiles, strict=True):
            places = torch.arange(len(tile.track)) if shortened else home[tile.places()]
            tile.features = tuple(level[places.to(level.device)] for level in packed)

    def _homes(self) -> list[Tensor]:
        """For every tile the place of each of its tokens among the placeholders: ``(tokens,)``."""
        visual = (self.picture.tokens >= 0).nonzero()[:, 0]
        homes = torch.empty(sum(len(tile.tile.grid) for tile in self.tiles), dtype=torch.long)
        homes[self.picture.tokens[visual]] = visual
        return list(homes.split([len(tile.tile.grid) for tile in self.tiles]))


@dataclass(eq=False)
class Encoding:
    """One run of the vision tower and the projector, on some of a call's pictures of one modality.

    attention: what the watched layers compute with; hidden: ``(sequences, tokens, dim)`` behind watched layers.
    merged, update: the two parts of a layer's output while a step between its halves has shortened it.
    """

    call: Call
    pictures: list[ReducedPicture]
    inputs: Inputs
    modality: Modality
    attention: taps.Captures = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    merged: Tensor | None = None
    update: Tensor | None = None

    @property
    def tiles(self) -> list[ReducedTile]:
        return [tile for picture in self.pictures for tile in picture.tiles]

    @property
    def first(self) -> int:
        """The number of its first encoder sequence among all of the call."""
        return self.pictures[0].tiles[0].tile.sequence

    def sequence(self, states: Tensor, tile: ReducedTile) -> Tensor:
        """One tile's own stretch of an encoder layer's states: ``(tokens, dim)``."""
        packed = states if states.ndim == 2 else states[tile.tile.sequence - self.first]
        return packed if tile.tile.extent is None else packed[tile.tile.extent]


class Tower:
    """The vision side of an attachment: encodes pictures, and watches the layers that signals ask for.

    attention, hidden: the watched layers.
    """

    def __init__(self, family: ModelFamily, attention: set[int], hidden: set[int], one_by_one: bool) -> None:
        self.family = family
        self.hidden = hidden
        self._one_by_one = one_by_one
        self.attention = {
            (modality, layer): family.encoder_attention(modality)[family.attention_layer(layer)]
            for modality in (family.placeholders if attention else ())
            for layer in attention
        }

    def modules(self) -> list[nn.Module]:
        """The modules that hooks stand on, or whose attention is watched."""
        layers = [
            self.family.encoder_layers(modality) for modality in (self.family.placeholders if self.hidden else ())
        ]
        return [*(each[number] for each in layers for number in self.hidden), *self.attention.values()]

    @contextmanager
    def installed(self, attachment: Any) -> Iterator[None]:
        """See what watched layers give while this context lasts."""
        with ExitStack() as stack:
            for modality in self.family.placeholders:
                layers = self.family.encoder_layers(modality) if self.hidden else ()
                for number in self.hidden:
                    hook = Hook(_recorder(attachment, layers[number], number))
                    stack.callback(layers[number].register_forward_hook(hook, prepend=True).remove)
            yield

    def encode(self, call: Call, inputs: Inputs) -> None:
        """Run the tower and the projector on every picture that is left anything of."""
        if all(len(tile.track) == 0 for picture in call.pictures for tile in picture.tiles):
            return
        for modality in self.family.placeholders:
            some = [picture for picture in call.pictures if picture.picture.modality == modality]
            # Images may lose different numbers of tokens inside the tower, so they then go through it one by one.
            size = 1 if self._one_by_one else max(1, len(some))
            for first in range(0, len(some), size):
                part = self.family.some(inputs, slice(first, first + size), modality) if size < len(some) else inputs
                self._encode(Encoding(call, some[first : first + size], part, modality))

    def _encode(self, encoding: Encoding) -> None:
        call = encoding.call
        call.encoding = encoding
        for tile in encoding.tiles:
            tile.encoding = encoding
        try:
            with taps.captured(self.attention.values()) as encoding.attention:
                encoded = self.family.encode(encoding.inputs, encoding.modality)
            for picture, features in zip(encoding.pictures, encoded, strict=True):
                picture.unpack(features, self.family.shortens)
        finally:
            call.encoding = None


def begin(call: Call) -> None:
    """Find the call's pictures and the prompts that they belong to."""
    family, inputs = call.attachment.family, call.inputs
    pictures = family.pictures(inputs)
    call.rows = placed(family, inputs, pictures)
    whole: dict[int, ReducedPicture] = {}
    for row, own in enumerate(call.rows):
        tiles = [(number, place, tile) for place, (number, _) in enumerate(own) for tile in pictures[number].tiles]
        journey = Journey([tile.described(place) for _, place, tile in tiles])
        for (number, _, tile), track in zip(tiles, journey.tracks, strict=True):
            picture = whole.setdefault(number, ReducedPicture(pictures[number], row, []))
            picture.tiles.append(ReducedTile(tile, track, journey, tile.encoded, tile.patches, tile.encoded))
        call.journeys.append(journey)
    call.pictures = [whole[number] for number in range(len(pictures))]


def enter(call: Call) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Let what is left of the pictures enter the language model.

    Gives for every prompt the columns of its placeholders that stay ``(k,)``, in the order of the tokens, and for every
    picture of the call its features.
    """
    columns: list[Tensor] = []
    features: list[tuple[Tensor, ...]] = [() for _ in call.pictures]
    for row, journey in zip(call.rows, call.journeys, strict=True):
        kept, entries, first = [torch.empty(0, dtype=torch.long)], [torch.empty(0, 2, dtype=torch.long)], 0
        for place, (number, own) in enumerate(row):
            picture = call.pictures[number]
            places, owners, features[number] = picture.left(raster=not call.attachment.compact)
            special = owners[:, 0] < 0
            if bool(special.any()):
                journey.tracks.append(Track.special(place, int(special.sum())))
            track = torch.where(special, len(journey.tracks) - 1, owners[:, 0] + first)
            entries.append(torch.stack([track, owners[:, 1]], dim=1))
            kept.append(own[places])
            first += len(picture.tiles)
        columns.append(torch.cat(kept))
        journey.enter(torch.cat(entries))
    for picture in call.pictures:  # what was seen on the way is not needed any more
        picture.packed = ()
        for tile in picture.tiles:
            tile.features, tile.encoding = (), None
    return columns, features


def _recorder(attachment: Any, own: nn.Module, number: int) -> Any:
    def record(layer: nn.Module, args: Any, output: Tensor) -> None:
        call = Call.of(attachment)
        if layer is own and call is not None and call.encoding is not None:
            call.encoding.hidden[number] = output

    return record
