"""The invariants: what a reducer must keep to on any model that can host it.

Each check takes a reducer, a model and a batch of inputs, and raises :class:`InvariantError` with the figure that is
wrong. :func:`check_reducer` runs them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenreduce.attach import Attachment, reduce_tokens
from tokenreduce.attach.vision import StepReduction, VisionSite
from tokenreduce.models.family import family_of
from tokenreduce.reducer import (
    AtDecoder,
    AtInput,
    AtProjector,
    Geometry,
    Grid,
    Positions,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    layer_index,
)
from tokenreduce.registry import MODELS

Inputs = Mapping[str, Any]


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
            tokens[signal]
        return Selection(torch.arange(len(tokens), device=tokens.features.device))


@dataclass(frozen=True)
class _Recorded(TokenReducer):
    """Another reducer, whose selections are written down."""

    inner: TokenReducer
    log: list[tuple[Step, Selection]]

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return self.inner.steps(geometry)

    def count(self, step: Step, span: Span) -> int | None:
        return self.inner.count(step, span)

    def positions_after(self, step: Step) -> Positions:
        return self.inner.positions_after(step)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        selection = self.inner.select(step, tokens)
        self.log.append((step, selection))
        return selection


def check_reducer(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Run every invariant on one reducer. Raises :class:`InvariantError` at the first that does not hold."""
    for check in INVARIANTS.values():
        check(reducer, model, inputs)


def identity_changes_nothing(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Keeping everything gives the plain model's logits and tokens, bit for bit, and so does watching alone."""
    plain, tokens = _logits(model, inputs), _generate(model, inputs)
    sites = [replace(step, keep=1.0) for step in _steps(reducer, model) if not isinstance(step, AtInput)]
    for site in sites or [AtProjector(keep=1.0)]:
        with reduce_tokens(model, Identity(site=site, positions=reducer.positions_after(site))):
            _same(plain, _logits(model, inputs), f"logits under the identity reducer at {site}")
            _same(tokens, _generate(model, inputs), f"tokens under the identity reducer at {site}")


def model_is_left_untouched(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """After the context, also one that ended in an error, the model answers as before."""
    before = _logits(model, inputs)
    attributes = set(vars(model))
    try:
        with reduce_tokens(model, reducer):
            _logits(model, inputs)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    _same(before, _logits(model, inputs), "logits after the context")
    if set(vars(model)) != attributes:
        raise InvariantError(f"the model's attributes changed: {set(vars(model)) ^ attributes}")


def counts_are_exact(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Every image keeps what ``count`` promised, and every layer's key-value cache has the prompt's reported length."""
    cache = DynamicCache()
    with reduce_tokens(model, reducer) as attachment:
        _call(model, inputs, past_key_values=cache)
    geometry = attachment.family.geometry
    steps = reducer.steps(geometry)
    inside = [number for number, step in enumerate(steps) if isinstance(step, AtDecoder)]
    for sample in attachment.samples:
        for image in sample.images:
            grid = image.grid
            left = entered = len(grid)
            for number, (step, done) in enumerate(zip(steps, image.steps, strict=True)):
                _check_source(reducer, image.grid, done)
                if number in inside:
                    continue
                _check_count(reducer, reducer.count(step, Span(geometry, (grid,), entered, left)), len(done.index))
                left = len(done.index)
                if isinstance(step, AtInput) and left:
                    grid, entered = grid.fit(left), left
        left = sample.entering
        for number in inside:
            if left:
                grids = tuple(image.grid for image in sample.images)
                promised = reducer.count(steps[number], Span(geometry, grids, sample.entering, left))
                left = sum(len(image.steps[number].index) for image in sample.images)
                _check_count(reducer, promised, left)
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
    with reduce_tokens(model, reducer) as attachment:
        reduced = _logits(model, _positioned(inputs, attachment))[:, -1]
        together = attachment.samples
    for row, single in enumerate(_rows(inputs, attachment)):
        plain_gap = (_logits(model, single)[0, -1] - plain[row]).abs().max()
        with reduce_tokens(model, reducer) as alone:
            gap = (_logits(model, single)[0, -1] - reduced[row]).abs().max()
        if together[row].images and alone.samples != [together[row]]:
            if plain_gap and model.dtype != torch.float32 and any(isinstance(step, AtDecoder) for step in steps):
                continue  # what the language model shows differs too, by rounding, and a near tie may fall either way
            raise InvariantError(f"{reducer} keeps other tokens of sample {row} when it stands alone")
        allowed = 4 * max(float(plain_gap), torch.finfo(model.dtype).eps * float(plain[row].abs().max()))
        if gap > allowed:
            raise InvariantError(
                f"sample {row} alone: logits differ by {gap:.2e}, where at most {allowed:.2e} is rounding"
            )


def runs_repeat(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """The same call gives the same selection and the same logits."""
    with reduce_tokens(model, reducer) as attachment:
        logits, samples = _logits(model, inputs), attachment.samples
        _same(logits, _logits(model, inputs), "logits of a second run")
    if attachment.samples != samples:
        raise InvariantError(f"{reducer} chose differently in a second run")


def equals_the_literal_sequence(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """The language model computes what a plain loop over its layers computes on the tokens that stay."""
    with reduce_tokens(model, reducer) as attachment:
        reduced = _logits(model, _positioned(inputs, attachment))[:, 0]
        rows = list(_rows(inputs, attachment))
    for row, single in enumerate(rows):
        _close(_literal(model, single, reducer), reduced[row], f"logits of sample {row} against the literal sequence")


def dropping_equals_masking(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Plain dropping at the projector with original positions equals the full-length model with the dropped tokens
    masked."""
    with reduce_tokens(model, reducer.with_positions("original")) as attachment:
        reduced = _logits(model, inputs)
        if not attachment.drops_only:
            return
        rows = _places(attachment)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    positions = attachment.family.positions(ids, mask)
    for row, kept in enumerate(rows):
        placeholders = (ids[row] == attachment.family.placeholder).nonzero()[:, 0]
        dropped = torch.ones(len(placeholders), dtype=torch.bool, device=ids.device)
        dropped[kept] = False
        mask[row, placeholders[dropped]] = 0
    masked = _logits(model, {**inputs, "attention_mask": mask, "position_ids": positions})
    _close(masked, reduced, "logits against the masked full-length model")


def dtype_is_kept(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Logits keep the plain model's dtype and device."""
    plain = _logits(model, inputs)
    with reduce_tokens(model, reducer):
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


def _check_count(reducer: TokenReducer, promised: int | None, kept: int) -> None:
    if promised is not None and kept != promised:
        raise InvariantError(f"{reducer} promised {promised} tokens and kept {kept}")


def _check_source(reducer: TokenReducer, grid: Grid, done: StepReduction) -> None:
    """Every token went into a row, and every row that stands for a token holds it."""
    if len(done.source) != len(grid) or min(done.source) < -1:
        raise InvariantError(f"{reducer} gave a source that is no map of {len(grid)} tokens: {done.source}")


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
    positions = attachment.family.positions(inputs["input_ids"], inputs["attention_mask"])
    return {**inputs, "position_ids": positions}


def _rows(inputs: Inputs, attachment: Attachment) -> Iterator[dict[str, Any]]:
    """Every sample as a batch of one, without padding."""
    image = 0
    for row, sample in enumerate(attachment.samples):
        valid = inputs["attention_mask"][row].bool()
        single = {"input_ids": inputs["input_ids"][row, valid][None], "attention_mask": valid[valid][None].long()}
        if count := len(sample.images):
            single["pixel_values"] = inputs["pixel_values"][image : image + count]
            image += count
        yield single


def _places(attachment: Attachment) -> list[Tensor]:
    """For every sample, the places among its placeholders that stay."""
    rows = []
    for sample in attachment.samples:
        offsets = itertools.accumulate((len(image.grid) for image in sample.images), initial=0)
        kept = [offset + place for image, offset in zip(sample.images, offsets, strict=False) for place in image.kept]
        rows.append(torch.tensor(kept, dtype=torch.long))
    return rows


def _literal(model: PreTrainedModel, single: Inputs, reducer: TokenReducer) -> Tensor:
    """The last logits of one sample, ``(vocabulary,)``: embeddings, position ids and layers put together by hand."""
    log: list[tuple[Step, Selection]] = []
    with reduce_tokens(model, _Recorded(inner=reducer, log=log)) as attachment:
        _logits(model, single)
    inside = [(step, selection) for step, selection in log if isinstance(step, AtDecoder)]
    site = VisionSite(reducer, attachment.family)
    images = []
    if "pixel_values" in single:
        with site.installed(), torch.no_grad():
            images = site.reduce(single)
    ids, placeholder = single["input_ids"][0], attachment.family.placeholder
    visual: list[int] = []
    embeddings, positions, column = [], [], 0
    while column < len(ids):
        if ids[column] != placeholder:
            embeddings.append(model.get_input_embeddings()(ids[column])[None])
            positions.append(column)
            column += 1
            continue
        image = images.pop(0)
        if image.features is not None:
            embeddings.append(image.features)
        visual += range(len(positions), len(positions) + len(image.index))
        positions += [column + place for place in image.placeholders().tolist()]
        column += len(image.grid)
    before = [step for step in _steps(reducer, model) if not isinstance(step, AtDecoder)]
    if before and reducer.positions_after(before[-1]) == "compact":
        positions = list(range(len(positions)))
    whole = list(positions)
    decoder: Any = attachment.family.decoder
    with torch.no_grad():
        hidden = torch.cat(embeddings)[None]
        for number, layer in enumerate(decoder.layers):
            for step, selection in inside:
                if layer_index(step.layer, len(decoder.layers)) != number:
                    continue
                rows = hidden[0, visual][selection.index] if selection.features is None else selection.features
                kept = [visual[place] for place in sorted(selection.index.tolist())]
                stays = [slot for slot in range(len(positions)) if slot not in visual or slot in kept]
                hidden[0, kept] = rows
                hidden, positions = hidden[:, stays], [positions[slot] for slot in stays]
                if reducer.positions_after(step) == "compact":
                    positions = whole[: len(positions)]
                visual = [stays.index(slot) for slot in kept]
            places = torch.tensor([positions], device=hidden.device)
            hidden = layer(
                hidden,
                attention_mask=_triangle(hidden, decoder.config._attn_implementation),
                position_ids=places,
                position_embeddings=decoder.rotary_emb(hidden, places),
            )
        return model.lm_head(decoder.norm(hidden)[0, -1])


def _triangle(hidden: Tensor, kernel: str) -> Tensor | None:
    """The causal mask where the attention kernel needs one to be given."""
    if kernel != "eager":
        return None
    length = hidden.shape[1]
    refused = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    return torch.zeros_like(refused, dtype=hidden.dtype).masked_fill(refused, torch.finfo(hidden.dtype).min)[None, None]


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
