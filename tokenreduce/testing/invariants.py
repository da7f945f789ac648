"""The invariants: what a reducer must keep to on any model that can host it.

Each check takes a reducer, a model and a batch of inputs, and raises :class:`InvariantError` with the figure that is
wrong. :func:`check_reducer` runs them all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenreduce.attach import Attachment, reduce_tokens
from tokenreduce.attach.call import Call, placed
from tokenreduce.attach.encoding import Tower
from tokenreduce.models.family import ModelFamily, family_of
from tokenreduce.models.stack import DecoderStack
from tokenreduce.passage import ImageReduction, SampleReduction
from tokenreduce.reducer import (
    AtProjector,
    Count,
    Geometry,
    Selection,
    Span,
    Step,
    Tile,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.registry import MODELS
from tokenreduce.testing.wrapping import Wrapped

Inputs = Mapping[str, Any]

QUESTION = "what is in the picture ?"
"""What reducers that read the question are told."""


Owner = tuple[int, int, int]
"""A visual token in a sequence: its slot, the number of its tile in the prompt, below 0 for a special token, and its
picture's."""


class InvariantError(AssertionError):
    """A reducer, or the framework under it, does not keep an invariant."""


@dataclass(frozen=True)
class Identity(TokenReducer):
    """Keeps every token at ``site``, going the whole way through watching, selecting, gathering and repacking."""

    site: Step = field(default_factory=lambda: AtProjector(keep=1.0))

    def steps(self, geometry: Geometry) -> list[Step]:
        return [self.site]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        for signal in step.sees:
            tokens.each(signal)
        return Selection(torch.arange(len(tokens), device=tokens.features.device))


@dataclass(frozen=True)
class _Recorded(Wrapped):
    """Another reducer, whose selections are written down."""

    log: list[tuple[Step, Selection]]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        selection = super().select(step, tokens)
        self.log.append((step, selection))
        return selection


def check_reducer(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Run every invariant on one reducer. Raises :class:`InvariantError` at the first that does not hold."""
    for check in INVARIANTS.values():
        check(reducer, model, inputs)


def identity_changes_nothing(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Keeping everything gives the plain model's logits and tokens, bit for bit, and so does watching alone.

    With a step inside the vision encoder pictures go through it one by one: in low precision several of them are then
    equal to those that go through together only up to rounding.
    """
    plain, tokens = _logits(model, inputs), _generate(model, inputs)
    sites = [replace(step, keep=1.0, ordered=False) for step in _steps(reducer, model) if not step.resizes]
    for site in sites or [AtProjector(keep=1.0)]:
        with attached(model, Identity(site=site, positions=reducer.positions_after(site))) as attachment:
            logits = _logits(model, inputs)
            pictures = sum(len(sample.images) for sample in attachment.samples)
            singly = any(each.one_by_one for each in attachment.sites)
            if singly and pictures > 1 and model.dtype != torch.float32:
                _close(plain, logits, f"logits under the identity reducer at {site}")
                continue
            _same(plain, logits, f"logits under the identity reducer at {site}")
            _same(tokens, _generate(model, inputs), f"tokens under the identity reducer at {site}")


def model_is_left_untouched(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """After the context, also one that ended in an error, the model answers as before."""
    before = _logits(model, inputs)
    attributes = set(vars(model))
    try:
        with attached(model, reducer):
            _logits(model, inputs)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    _same(before, _logits(model, inputs), "logits after the context")
    if set(vars(model)) != attributes:
        raise InvariantError(f"the model's attributes changed: {set(vars(model)) ^ attributes}")


def counts_are_exact(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Every scope keeps what ``count`` promised, and every layer's key-value cache has the prompt's reported length."""
    cache = DynamicCache()
    with attached(model, reducer) as attachment:
        _call(model, inputs, past_key_values=cache)
    geometry = attachment.family.geometry
    steps = reducer.steps(geometry)
    for sample in attachment.samples:
        tiles = [Tile(image.grid, image.role, image.picture, time=image.time) for image in sample.images]
        left: list[int] = [len(tile.grid) for tile in tiles]
        entered: list[int] = left
        special, inside = sample.visual_tokens - sum(entered), False
        for number, step in enumerate(steps):
            layer = step.decoder_layer(geometry)
            done = [image.steps[number] for image in sample.images]
            for image in sample.images:
                _check_source(reducer, image, number, sample)
            after = [len(each.index) for each in done]
            if layer is not None and not inside:
                entered, inside = left, True
            if layer is None or not special:
                for group in _groups(step, tiles):
                    here = sum(left[place] for place in group)
                    if not here:
                        continue
                    span = Span(
                        geometry, tuple(tiles[place] for place in group), sum(entered[place] for place in group), here
                    )
                    _check_count(reducer, reducer.count(step, span), sum(after[place] for place in group))
                if step.resizes:
                    tiles = [
                        replace(tile, grid=tile.grid.fit(count)) if count else tile
                        for tile, count in zip(tiles, after, strict=True)
                    ]
                    entered = after
            left = after
        text = sample.lengths[0] - sample.entering
        if sample.images and not special and sample.lengths[-1] - text != sum(left):
            raise InvariantError(f"{reducer}: the last layer saw {sample.lengths[-1] - text} of {sum(left)} tokens")
    for layer, entry in enumerate(cache.layers):
        longest = max(sample.lengths[layer] for sample in attachment.samples)
        if entry.get_seq_length() != longest:
            raise InvariantError(
                f"layer {layer} caches {entry.get_seq_length()} tokens where the longest prompt has {longest}"
            )


def neighbours_do_not_matter(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """A sample keeps the same tokens alone as in the batch, and its logits differ by no more than the plain model's
    do."""
    if len(inputs["input_ids"]) == 1:
        return
    steps = _steps(reducer, model)
    plain = _logits(model, inputs)[:, -1]
    with attached(model, reducer) as attachment:
        reduced = _logits(model, _positioned(inputs, attachment))[:, -1]
        together = attachment.samples
    for row, single in enumerate(_rows(inputs, attachment)):
        plain_gap = (_logits(model, single)[0, -1] - plain[row]).abs().max()
        with attached(model, reducer) as alone:
            gap = (_logits(model, single)[0, -1] - reduced[row]).abs().max()
        if together[row].images and alone.samples != [together[row]]:
            inside = any(step.decoder_layer(attachment.family.geometry) is not None for step in steps)
            if plain_gap and model.dtype != torch.float32 and inside:
                continue  # what the language model shows differs too, by rounding, and a near tie may fall either way
            raise InvariantError(f"{reducer} keeps other tokens of sample {row} when it stands alone")
        allowed = max(4 * float(plain_gap), 16 * torch.finfo(model.dtype).eps * float(plain[row].abs().max()))
        if gap > allowed:
            raise InvariantError(
                f"sample {row} alone: logits differ by {gap:.2e}, where at most {allowed:.2e} is rounding"
            )


def runs_repeat(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """The same call gives the same selection and the same logits."""
    with attached(model, reducer) as attachment:
        logits, samples = _logits(model, inputs), attachment.samples
        _same(logits, _logits(model, inputs), "logits of a second run")
    if attachment.samples != samples:
        raise InvariantError(f"{reducer} chose differently in a second run")


def equals_the_literal_sequence(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """The language model computes what a plain loop over its layers computes on the tokens that stay."""
    with attached(model, reducer) as attachment:
        reduced = _logits(model, _positioned(inputs, attachment))[:, 0]
        rows = list(_rows(inputs, attachment))
    for row, single in enumerate(rows):
        _close(_literal(model, single, reducer), reduced[row], f"logits of sample {row} against the literal sequence")


def dropping_equals_masking(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Plain dropping at the projector with original positions equals the full-length model with the dropped tokens
    masked."""
    with attached(model, reducer.with_positions("original")) as attachment:
        reduced = _logits(model, inputs)
        if not attachment.drops_only:
            return
        prompt = attachment.prompt
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    if prompt is None or _window(attachment.family) < ids.shape[1]:
        return  # a window counts the tokens that are left, so dropping brings more of them into it than masking does
    positions = attachment.family.positions(inputs)
    for row, visual in enumerate(attachment.visual(ids)):
        visual[prompt.columns[row]] = False
        mask[row, visual] = 0
    masked = _logits(model, {**inputs, "attention_mask": mask, "position_ids": positions})
    _close(masked, reduced, "logits against the masked full-length model")


def dtype_is_kept(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Logits keep the plain model's dtype and device."""
    plain = _logits(model, inputs)
    with attached(model, reducer):
        reduced = _logits(model, inputs)
    if (reduced.dtype, reduced.device) != (plain.dtype, plain.device):
        raise InvariantError(f"logits became {reduced.dtype} on {reduced.device}, from {plain.dtype} on {plain.device}")


INVARIANTS: dict[str, Callable[[TokenReducer, PreTrainedModel, Inputs], None]] = {
    check.__name__: check
    for check in (
        identity_changes_nothing,
        model_is_left_untouched,
        counts_are_exact,
        neighbours_do_not_matter,
        runs_repeat,
        equals_the_literal_sequence,
        dropping_equals_masking,
        dtype_is_kept,
    )
}


def _groups(step: Step, tiles: Sequence[Tile]) -> list[list[int]]:
    """The tiles, by their places, that one selection of a step is about."""
    groups: dict[int, list[int]] = {}
    for place, tile in enumerate(tiles):
        groups.setdefault({"tile": place, "picture": tile.picture, "sample": 0}[step.scope], []).append(place)
    return list(groups.values())


def _check_count(reducer: TokenReducer, promised: Count, kept: int) -> None:
    least, most = (promised, promised) if isinstance(promised, int) else promised or (0, kept)
    if not least <= kept <= most:
        raise InvariantError(f"{reducer} promised {promised} tokens and kept {kept}")


def _check_source(reducer: TokenReducer, image: ImageReduction, number: int, sample: SampleReduction) -> None:
    """Every token went into a row that is there, and every row that stands for a token holds it or another's."""
    done = image.steps[number]
    if len(done.source) != len(image.grid) or (done.source and min(done.source) < -1):
        raise InvariantError(f"{reducer} gave a source that is no map of {len(image.grid)} tokens: {done.source}")
    for row, tile in zip(done.source, done.into, strict=True) if done.into else ():
        if tile >= 0 and row >= len(sample.images[tile].steps[number].index):
            raise InvariantError(f"{reducer}: a token went into row {row} of tile {tile}, which has no such row")
    if not done.into and done.source and max(done.source) >= len(done.index):
        raise InvariantError(f"{reducer}: a token went into row {max(done.source)} of {len(done.index)}")


class _Reading:
    """Stands in for a processor, to whoever wants the question's tokens: a word's is the one of its length."""

    def tokenizer(self, text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}


def attached(model: PreTrainedModel, reducer: TokenReducer) -> AbstractContextManager[Attachment]:
    """A reducer in a model, with what one that reads needs to be told."""
    return reduce_tokens(model, reducer, question=QUESTION, processor=_Reading())


def _call(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def _logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """``(rows, 1, vocabulary)``: the logits that decide the first new token."""
    return _call(model, inputs).logits[:, -1:]


def _generate(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


def _positioned(inputs: Inputs, attachment: Attachment) -> dict[str, Any]:
    """The inputs with the position ids that every prompt has alone. A forward call without any counts padding, which
    turns the keys that a reducer may look at."""
    positions = attachment.family.positions(inputs)
    return {**inputs, "position_ids": positions + attachment.family.first_position}


def _rows(inputs: Inputs, attachment: Attachment) -> Iterator[dict[str, Any]]:
    """Every sample as a batch of one, without padding."""
    family, shape = attachment.family, inputs["input_ids"].shape
    pictures = family.pictures(inputs) if any(name in inputs for name in family.vision_inputs) else []
    first = {modality: 0 for modality in family.placeholders}
    for row, own in enumerate(placed(family, inputs, pictures)):
        valid = inputs["attention_mask"][row].bool()
        single = {
            name: value[row, valid][None]
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.shape == shape
        }
        for modality, start in first.items():
            if count := sum(pictures[number].modality == modality for number, _ in own):
                first[modality] = start + count
                single |= family.some(inputs, slice(start, start + count), modality)
        yield single


def _literal(model: PreTrainedModel, single: Inputs, reducer: TokenReducer) -> Tensor:
    """The last logits of one sample, ``(vocabulary,)``: embeddings, position ids and layers put together by hand."""
    log: list[tuple[Step, Selection]] = []
    with attached(model, _Recorded(inner=reducer, log=log)) as attachment:
        _logits(model, single)
    geometry = attachment.family.geometry
    chosen = iter([selection for step, selection in log if step.decoder_layer(geometry) is not None])
    family, ids = attachment.family, single["input_ids"][0]
    decoder: Any = family.decoder
    order, owners, levels = _entering(attachment, reducer, single)
    visual = [slot for slot, _, _ in owners]
    text_ids = ids.masked_fill(attachment.visual(ids), 0)
    compact = _compact(reducer, model)
    whole = family.positions(single)[..., 0, :] + family.first_position
    whole = whole.reshape(-1, len(ids))[-3:]  # three rows where positions are in space and time
    positions = _without_gaps(whole, attachment.visual(ids), order) if compact else whole[:, order]
    columns = torch.arange(len(order))
    entering, entered = positions, visual
    blocks = family.blocks(single)
    blocks = None if blocks is None else blocks[0, order]
    sight = torch.zeros(len(order), len(order), dtype=torch.int8)
    with torch.no_grad():
        hidden = model.get_input_embeddings()(text_ids[order])[None]
        if levels:
            hidden[0, visual] = levels[0].to(hidden.dtype)
        deeper = [torch.zeros_like(hidden) for _ in levels[1:]]
        for added, level in zip(deeper, levels[1:], strict=True):
            added[0, visual] = level
        for number, layer in enumerate(decoder.layers):
            for step in [each for each in reducer.steps(geometry) if each.decoder_layer(geometry) == number]:
                groups = list(_scoped(step, owners))
                kept = [owner for owner in owners if all(owner not in group for group in groups)]
                for group in groups:
                    slots, selection = [slot for slot, _, _ in group], next(chosen)
                    index = selection.index.tolist()
                    if selection.sight is not None:
                        sight = torch.where(selection.sight == 0, sight, selection.sight)
                    own = [slots[place] for place in sorted(index)]
                    hidden[0, own] = hidden[0, slots][index] if selection.features is None else selection.features
                    kept += [(slot, *group[place][1:]) for slot, place in zip(own, index, strict=True)]
                left = {slot for slot, _, _ in kept}
                stays = [slot for slot in range(len(columns)) if slot not in visual or slot in left]
                hidden, columns, positions = hidden[:, stays], columns[stays], positions[:, stays]
                sight = sight[stays][:, stays]
                deeper = [added[:, stays] for added in deeper]
                blocks = None if blocks is None else blocks[stays]
                if reducer.positions_after(step) == "compact":
                    flags = torch.zeros(len(order), dtype=torch.bool)
                    flags[entered] = True
                    positions = _without_gaps(entering, flags, columns)
                owners = [(stays.index(slot), tile, picture) for slot, tile, picture in sorted(kept)]
                visual = [slot for slot, _, _ in owners]
            kind = _kind(decoder, number)
            places = positions[:, None] if len(positions) > 1 else positions
            hidden = layer(
                hidden,
                attention_mask=_sight(decoder, number, columns, blocks, sight, hidden.dtype),
                position_ids=positions[:1],
                position_embeddings=decoder.rotary_emb(hidden, places, *([kind] if _takes_kind(decoder) else [])),
            )
            if number < len(deeper):
                hidden = hidden + deeper[number]
        return _headed(model, single, decoder.norm(hidden)[0, -1])


def _headed(model: PreTrainedModel, single: Inputs, states: Tensor) -> Tensor:
    """The logits ``(vocabulary,)`` that a model makes of final states ``(dim,)``: by its head, and what it does behind
    that."""
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: (states.expand_as(args[0]),))
    try:
        return model(**single).logits[0, -1]
    finally:
        hook.remove()


def _scoped(step: Step, owners: Sequence[Owner]) -> Iterator[list[Owner]]:
    """The visual tokens in a sequence that a selection of a step is about, selection by selection."""
    keys = [{"tile": tile, "picture": picture, "sample": 0}[step.scope] for _, tile, picture in owners]
    for key in sorted(set(keys)):
        if step.scope != "tile" or key >= 0:
            yield [owner for owner, each in zip(owners, keys, strict=True) if each == key]


def _entering(
    attachment: Attachment, reducer: TokenReducer, single: Inputs
) -> tuple[Tensor, list[Owner], list[Tensor]]:
    """What enters the language model: for every slot the column of the prompt that it stands for, the visual tokens
    among them, and for every level of features those tokens' own."""
    ids, chosen, owned, features = single["input_ids"][0], [], [], []
    if attachment.brings_pictures(single):
        with (
            attached(attachment.model, reducer) as again,
            torch.no_grad(),
            Call(again, dict(single)).current() as call,
        ):
            again.tower = again.tower or Tower(again.family, set(), set(), one_by_one=False)
            (kept,), every = again.reduced(call, single)
            chosen = kept.tolist()
            features = [every[number] for number, _ in call.rows[0] if every[number]]
            tracks = [call.journeys[0].tracks[place] for place in call.journeys[0].entered[:, 0].tolist()]
            owned = [(max(track.number, -1), track.tile.picture) for track in tracks]
    text = (~attachment.visual(ids)).nonzero()[:, 0].tolist()
    slots = sorted(text + chosen)
    visual = [slot for slot, column in enumerate(slots) if column in set(chosen)]
    for slot, column in zip(visual, chosen, strict=True):
        slots[slot] = column
    levels = [torch.cat(level) for level in zip(*features, strict=True)]
    owners = [(slot, *owner) for slot, owner in zip(visual, owned, strict=True)]
    return torch.tensor(slots), owners, levels


def _without_gaps(whole: Tensor, visual: Tensor, kept: Tensor) -> Tensor:
    """Positions ``(axes, n)`` of the slots ``kept`` of a sequence with positions ``(axes, length)``, token by token."""
    slots, result, place, back = kept.tolist(), torch.empty(len(whole), len(kept), dtype=torch.long), 0, 0
    if len(whole) == 1:
        return whole[0, 0] + torch.arange(len(slots))[None]
    while place < len(visual):
        end = place + 1
        while visual[place] and end < len(visual) and visual[end]:
            end += 1
        here = [slot for slot in range(len(slots)) if place <= slots[slot] < end]
        top = int(whole[:, place:end].min()) - 1
        for axis in range(len(whole)):
            values = sorted(set(whole[axis, place:end].tolist()))
            left = sorted({int(whole[axis, slots[slot]]) for slot in here})
            for slot in here:
                result[axis, slot] = values[left.index(int(whole[axis, slots[slot]]))] - back
            top = max([top, *values[: len(left)]])
        if visual[place]:
            back += int(whole[:, place:end].max()) - top
        place = end
    return result


def _compact(reducer: TokenReducer, model: PreTrainedModel) -> bool:
    """True if something is done before the language model and positions close up behind it."""
    geometry = family_of(model, MODELS.usable()).geometry
    before = [step for step in reducer.steps(geometry) if step.decoder_layer(geometry) is None]
    return bool(before) and reducer.positions_after(before[-1]) == "compact"


def _kind(decoder: Any, number: int) -> str:
    return (getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers))[number]


def _takes_kind(decoder: Any) -> bool:
    return "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters


def _window(family: ModelFamily) -> float:
    """How far back the layers with the shortest sight see."""
    windows = [family.stack.sliding_window(number) for number in range(family.geometry.decoder_layers)]
    return min((window for window in windows if window is not None), default=math.inf)


def _sight(
    decoder: Any, number: int, columns: Tensor, blocks: Tensor | None, said: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What each of the slots may see in a layer, as its attention kernel wants it: ``(1, 1, n, n)``. A method may have
    ``said`` otherwise, ``(n, n)``."""
    allowed = torch.ones(len(columns), len(columns), dtype=torch.bool).tril()
    eager = decoder.config._attn_implementation == "eager"
    if blocks is not None:
        allowed = allowed | ((blocks[:, None] == blocks[None]) & (blocks[None] >= 0))
    if (window := DecoderStack(decoder).sliding_window(number)) is not None:
        allowed = allowed & (columns[:, None] - columns[None] < window)
    elif blocks is None and not eager and not bool(said.any()):
        return None
    allowed = (allowed | (said > 0)) & (said >= 0)
    if not eager:
        return allowed[None, None]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


def _steps(reducer: TokenReducer, model: PreTrainedModel) -> Sequence[Step]:
    return reducer.steps(family_of(model, MODELS.usable()).geometry)


def _same(expected: Tensor, found: Tensor, what: str) -> None:
    if not torch.equal(expected, found):
        raise InvariantError(f"{what} are not bit-identical")


def _close(expected: Tensor, found: Tensor, what: str) -> None:
    """Equal up to rounding: 1e-5 of the largest value in float32, 64 units of the dtype's precision otherwise."""
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    unit = 1e-5 if expected.dtype == torch.float32 else 64 * torch.finfo(expected.dtype).eps
    if not difference <= unit * largest:
        raise InvariantError(f"{what} differ by {difference:.2e}, where {unit * largest:.2e} is rounding")
