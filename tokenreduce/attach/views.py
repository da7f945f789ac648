"""What the sites show to signals: of the vision tower, of the language model, and of the question."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokenreduce.attach import masks, taps
from tokenreduce.attach.call import Call
from tokenreduce.attach.clip import clip_space
from tokenreduce.models.family import ModelFamily
from tokenreduce.models.stack import DecoderStack
from tokenreduce.passage import Track
from tokenreduce.reducer import Layer, Step, TokenReducer
from tokenreduce.signals import Attention, Clip, Scene, Signal, Unseen

if TYPE_CHECKING:
    from tokenreduce.attach.encoding import Encoding, ReducedTile
    from tokenreduce.attach.site import Site
    from tokenreduce.attach.stage import Prefill

INSIDE = "the language model has not run yet"
BEFORE = "the vision encoder has run by then"
UNTAPPED = "that layer has not run yet, or not through transformers' attention interface"


class Watched:
    """What the signals of a site's steps ask for, gathered before anything runs; by itself a site shows nothing."""

    def __init__(self, family: ModelFamily, processor: Any = None) -> None:
        self.family, self.geometry = family, family.geometry
        self.asks = False
        self._processor = processor
        self.attention: set[int] = set()
        self.hidden: set[int] = set()

    def encoder_attention(self, layer: Layer) -> None:
        raise Unseen(BEFORE)

    def encoder_hidden(self, layer: Layer) -> None:
        raise Unseen(BEFORE)

    def class_token(self) -> None:
        raise Unseen(BEFORE)

    def token_sizes(self) -> None:
        raise Unseen(BEFORE)

    def decoder_attention(self, layer: Layer) -> None:
        raise Unseen(INSIDE)

    def decoder(self) -> None:
        raise Unseen(INSIDE)

    def question(self) -> None:
        self.asks = True

    def processor(self) -> None:
        if self._processor is None:
            raise Unseen("the model's processor is not known: pass processor= to reduce_tokens")


class TowerWatched(Watched):
    """What is watched in the vision tower."""

    def encoder_attention(self, layer: Layer) -> None:
        asked = self.geometry.encoder_layer(layer)
        self.attention.add(asked)
        if (shown := self.family.attention_layer(asked)) != asked:
            _say(
                f"the attention of encoder layer {asked} of {type(self.family).__name__} models does not reach over a "
                f"whole tile: that of layer {shown} stands in for it"
            )

    def encoder_hidden(self, layer: Layer) -> None:
        self.hidden.add(self.geometry.encoder_layer(layer))

    def token_sizes(self) -> None:
        pass

    def class_token(self) -> None:
        if not self.geometry.class_token:
            raise Unseen("its vision encoder has no class token")


@cache
def _say(message: str) -> None:
    """Warn, once in a process."""
    warnings.warn(message, stacklevel=2)


class DecoderWatched(Watched):
    """What is watched in the language model: the attention of ``attention``."""

    def decoder_attention(self, layer: Layer) -> None:
        self.attention.add(self.geometry.decoder_layer(layer))

    def decoder(self) -> None:
        pass


class Sight:
    """What every site shows: the scene and the question. The rest raises :class:`Unseen`.

    tracks: those of the tiles that are shown; before: why they show nothing of the vision encoder.
    """

    before: ClassVar[str] = BEFORE

    def __init__(self, call: Call, row: int, tracks: Sequence[Track]) -> None:
        self.call, self.row = call, row
        self.geometry = call.attachment.family.geometry
        self.tracks = tracks

    @property
    def numbers(self) -> list[int]:
        """Which of the prompt's tiles are shown."""
        return [track.number for track in self.tracks]

    @property
    def scene(self) -> Scene:
        call, attachment = self.call, self.call.attachment
        tiles = tuple(track.tile for track in self.tracks)
        pictures = sorted({tile.picture for tile in tiles})
        pixels = tuple(call.pictures[call.rows[self.row][place][0]].picture.pixels for place in pictures)
        return Scene(attachment.family, call.inputs, tiles, pixels, call.question(self.row), attachment.processor)

    def encoder_attention(self, layer: Layer) -> Attention:
        raise Unseen(self.before)

    def encoder_hidden(self, layer: Layer) -> Tensor:
        raise Unseen(self.before)

    def class_token(self) -> Tensor:
        raise Unseen(self.before)

    def token_sizes(self) -> Tensor:
        raise Unseen(self.before)

    def clip(self, checkpoint: str, truncate: bool = False) -> Clip:
        raise Unseen(self.before)

    def decoder_attention(self, layer: Layer) -> Attention:
        raise Unseen(INSIDE)

    def look_ahead(self, rotated: bool) -> Attention:
        raise Unseen(INSIDE)

    def decoder_hidden(self, normed: bool) -> Tensor:
        raise Unseen(INSIDE)

    def entered(self) -> tuple[Tensor, Tensor]:
        raise Unseen(INSIDE)

    def question_embeddings(self, parts: Callable[[str], Sequence[str]] = lambda question: (question,)) -> Tensor:
        attachment = self.call.attachment
        tokenizer = attachment.processor.tokenizer
        read = (tokenizer(part, add_special_tokens=False, return_tensors="pt") for part in parts(self._question()))
        ids = torch.cat([torch.empty(0, dtype=torch.long), *(tokens["input_ids"][0].long() for tokens in read)])
        embeddings = attachment.model.get_input_embeddings()
        return embeddings(ids.to(self.call.inputs["input_ids"].device))

    def paired_text(self) -> Tensor:
        call, attachment = self.call, self.call.attachment
        pictures = {track.tile.picture for track in self.tracks}
        if len(pictures) != 1:
            raise Unseen("every picture has its own: ask for that of each tile")
        behind = [columns for _, columns in call.rows[self.row]][pictures.pop() :]
        ids, mask = call.inputs["input_ids"], call.inputs.get("attention_mask")
        if mask is None:
            mask = masks.of(call.inputs, attachment.model.generation_config, call.generating)
        own = slice(int(behind[0][-1]) + 1, int(behind[1][0]) if len(behind) > 1 else None)
        text = ids[self.row, own][mask[self.row, own] != 0]
        return attachment.model.get_input_embeddings()(text)

    def _question(self) -> str:
        question = self.call.question(self.row)
        if question is None:
            name = type(self.call.attachment.reducer).__name__
            raise ValueError(f"{name} reads the question: pass question= to reduce_tokens")
        return question


class JointSight(Sight):
    """What several tiles show together up to the language model."""

    before = "every tile has its own: a signal that is about all of them at once cannot have it"


class TowerSight(Sight):
    """What a tile shows up to the language model."""

    def __init__(self, call: Call, row: int, tile: ReducedTile) -> None:
        super().__init__(call, row, [tile.track])
        self.tile = tile

    def encoder_attention(self, layer: Layer) -> Attention:
        tile, encoding = self.tile, self._encoding()
        family = self.call.attachment.family
        shown = family.attention_layer(self.geometry.encoder_layer(layer))
        module = family.encoder_attention(encoding.modality)[shown]
        calls = encoding.attention[module]
        if not calls:
            raise Unseen(UNTAPPED)
        row, extent = tile.tile.sequence - encoding.first, tile.tile.extent
        if extent is None:
            (call,) = calls
            queries, keys, values = (each[row] for each in (call.queries, call.keys, call.values))
        else:  # a packed sequence, which most kernels take in stretches
            call, row = calls[0], 0
            queries, keys, values = (
                torch.cat([getattr(each, name)[0] for each in calls], dim=1)[:, extent]
                for name in ("queries", "keys", "values")
            )
        class_token = self.geometry.class_token
        self._check(queries.shape[1])
        return Attention(
            queries,
            keys,
            values,
            call.scale,
            visual=int(class_token) + tile.patches.to(queries.device),
            class_token=0 if class_token else None,
            mask=None if call.mask is None else call.mask[row if len(call.mask) > 1 else 0, 0],
            softcap=call.softcap,
        )

    def encoder_hidden(self, layer: Layer) -> Tensor:
        encoding = self._encoding()
        sequence = encoding.sequence(self._hidden(layer), self.tile)
        self._check(len(sequence))
        states = sequence[int(self.geometry.class_token) + self.tile.patches.to(sequence.device)]
        return states.mean(1) if states.ndim == 3 else states

    def class_token(self) -> Tensor:
        return self._encoding().sequence(self._hidden(self.geometry.feature_layer), self.tile)[0]

    def token_sizes(self) -> Tensor:
        track = self.tile.track
        return torch.ones(len(track)) if track.sizes is None else track.sizes

    def clip(self, checkpoint: str, truncate: bool = False) -> Clip:
        states = self.encoder_hidden(self.geometry.feature_layer)
        space = clip_space(checkpoint, states.device)
        return Clip(space.patches(states), *space.read(self._question(), truncate))

    def _encoding(self) -> Encoding:
        if self.tile.encoding is None:
            raise Unseen("the vision encoder has not run yet")
        return self.tile.encoding

    def _hidden(self, layer: Layer) -> Tensor:
        """What a layer gave for all tiles that went through the encoder together."""
        states = self._encoding().hidden.get(self.geometry.encoder_layer(layer))
        if states is None:
            raise Unseen("that layer has not run yet")
        return states

    def _check(self, length: int) -> None:
        """Raise :class:`Unseen` for a layer that saw a sequence of another length than the encoder has now."""
        if length != self.tile.held + int(self.geometry.class_token):
            raise Unseen("that layer ran before an earlier step in the encoder, on tokens that are gone")


class DecoderSight(Sight):
    """What one prompt shows at the input of a layer of the language model.

    arguments: what the layer is called with; memo: what the prompts of one cut share.
    place:     the prompt's row; slots: where the tokens that a selection is about stand in the sequence.
    """

    def __init__(
        self,
        call: Call,
        stack: DecoderStack,
        prefill: Prefill,
        layer: int,
        hidden: Tensor,
        arguments: Mapping[str, Any],
        memo: dict[bool, taps.Captured],
        place: int,
        tiles: Sequence[Track],
        slots: Tensor,
    ) -> None:
        copies = len(prefill.strands) // len(call.journeys)
        super().__init__(call, place // copies, tiles)
        self._stack, self._prefill, self._layer, self._hidden = stack, prefill, layer, hidden
        self._arguments, self._memo, self._place, self._slots = arguments, memo, place, slots

    def decoder_attention(self, layer: Layer) -> Attention:
        number, prefill = self.geometry.decoder_layer(layer), self._prefill
        if number >= self._layer:
            raise Unseen(
                f"that layer has not run yet; LookAheadAttention is what layer {self._layer} is about to attend to"
            )
        *_, captured = (None, *prefill.captured[self._stack.attention(number)])
        if captured is None:
            raise Unseen(UNTAPPED)
        stage = prefill.stage(number)
        return self._view(captured, (prefill.valid if stage is None else stage.valid)[self._place], number)

    def look_ahead(self, rotated: bool) -> Attention:
        if rotated not in self._memo:
            inputs = self._stack.attention_inputs(self._layer, self._hidden, self._arguments)
            if not rotated:
                cos, sin = inputs["position_embeddings"]
                inputs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
            module = self._stack.attention(self._layer)
            with taps.captured([module], stop=True) as found, suppress(taps.Seen):
                module(**inputs)
            (self._memo[rotated],) = found[module]
        valid = self._prefill.last.valid[self._place]
        return self._view(self._memo[rotated], valid, self._layer if rotated else None)

    def decoder_hidden(self, normed: bool) -> Tensor:
        states = self._hidden[self._place, self._sequence]
        return self._stack.norm(states) if normed else states

    def entered(self) -> tuple[Tensor, Tensor]:
        embeddings, entered = self._prefill.embeddings, self._prefill.strands[self._place].entered
        if embeddings is None:
            raise Unseen("the language model has not taken anything in")
        behind = self._prefill.valid[self._place].nonzero()[:, 0]
        visual = entered.to(embeddings.device)
        return embeddings[self._place, visual], embeddings[self._place, behind[behind > visual.max()]]

    @property
    def _sequence(self) -> Tensor:
        """The slots of this prompt, without padding: ``(sequence,)``."""
        return self._prefill.last.valid[self._place].nonzero()[:, 0]

    def _view(self, captured: taps.Captured, seen: Tensor, rotated_by: int | None) -> Attention:
        """One prompt's own part of an attention layer, which saw its tokens at the slots ``seen`` (n,) bool;
        ``rotated_by`` is the layer whose rotary embedding its keys have, if any."""
        valid, place = self._prefill.last.valid[self._place], self._place
        own, sequence = seen.nonzero()[:, 0], self._sequence
        if len(own) != len(sequence):
            raise Unseen("that layer ran before an earlier cut, on tokens that are gone")
        number = torch.zeros_like(valid, dtype=torch.long)
        number[sequence] = torch.arange(len(sequence), device=valid.device)
        last = int(number[int(self._prefill.strands[place].slots.max())])
        mask = captured.mask
        if mask is not None:
            mask = mask[place if len(mask) > 1 else 0, 0][own][:, own] if mask.ndim == 4 else None
        queries, keys = captured.queries[place][:, own], captured.keys[place][:, own]
        lead = 0 if rotated_by is None else self._lead()
        if lead and rotated_by is not None:  # as it is without padding before it
            queries, keys = (self._stack.rotated_back(each, lead, rotated_by) for each in (queries, keys))
        return Attention(
            queries,
            keys,
            captured.values[place][:, own],
            captured.scale,
            visual=number[self._slots.to(valid.device)],
            text=torch.arange(last + 1, len(sequence), device=valid.device),
            mask=mask,
            causal=mask is None,
            softcap=captured.softcap,
        )

    def _lead(self) -> int:
        """By how many positions this prompt stands behind where it would begin alone: a plain forward call counts the
        padding before it."""
        first, positions = int(self._prefill.valid[self._place].int().argmax()), self._prefill.positions
        if positions is None:
            return 0
        alone = self.call.attachment.family.first_position
        return int(positions.expand(self._prefill.valid.shape)[self._place, first]) - alone


def shown(site: Site, step: Step, tiles: Sequence[Sight], whole: Sight) -> Callable[[Signal], Sequence[Any]]:
    """How a step's tokens get its signals: from the views on its ``tiles``, or from the one on all of them."""

    def values(signal: Signal) -> Sequence[Any]:
        if signal not in step.sees:
            raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
        try:
            return [signal.value(view) for view in ([whole] if signal.joint else tiles)]
        except Unseen as error:
            raise unseen(site.reducer, step, signal, site.family, error) from error

    return values


def unseen(reducer: TokenReducer, step: Step, signal: Any, family: ModelFamily, reason: object) -> ValueError:
    """The error that a signal cannot be shown, which names it, the site and the family."""
    return ValueError(
        f"{type(reducer).__name__} asks to see {signal} {type(step).__name__}, which {type(family).__name__} models "
        f"cannot show: {reason}"
    )
