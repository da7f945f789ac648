"""The invariants: what a reducer must keep to on any model that can host it.

Each check takes a reducer, a model and a batch of inputs, and raises :class:`InvariantError` with the figure that is
wrong. :func:`check_reducer` runs them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenreduce.attach import Attachment, reduce_tokens
from tokenreduce.attach.images import ReducedImage, reduce_images
from tokenreduce.reducer import AtProjector, Geometry, Selection, Span, Step, TokenReducer, VisualTokens

Inputs = Mapping[str, Any]


class InvariantError(AssertionError):
    """A reducer, or the framework under it, does not keep an invariant."""


@dataclass(frozen=True)
class Identity(TokenReducer):
    """Keeps every token, going the whole way through selecting, gathering and repacking; no shortcut is taken."""

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(1.0)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(len(tokens), device=tokens.features.device))


def check_reducer(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Run every invariant on one reducer. Raises :class:`InvariantError` at the first that does not hold."""
    for check in INVARIANTS.values():
        check(reducer, model, inputs)


def identity_changes_nothing(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Keeping everything gives the plain model's logits and tokens, bit for bit, and so does watching alone."""
    plain = _logits(model, inputs)
    tokens = _generate(model, inputs)
    with reduce_tokens(model, Identity(positions=reducer.positions)):
        _same(plain, _logits(model, inputs), "logits under the identity reducer")
        _same(tokens, _generate(model, inputs), "tokens under the identity reducer")


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
    steps = reducer.steps(attachment.family.geometry)
    for sample in attachment.samples:
        for image in sample.images:
            left = len(image.grid)
            for step, done in zip(steps, image.steps, strict=True):
                promised = reducer.count(step, Span((image.grid,), len(image.grid), left))
                left = len(done.index)
                if promised is not None and left != promised:
                    raise InvariantError(f"{reducer} promised {promised} tokens and kept {left}")
                if len(done.source) != len(image.grid) or not set(done.source) <= {*range(left), -1}:
                    raise InvariantError(
                        f"{reducer} gave a source that is no map from {len(image.grid)} tokens to {left}"
                    )
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
    plain = _logits(model, inputs)[:, -1]
    with reduce_tokens(model, reducer) as attachment:
        reduced = _logits(model, inputs)[:, -1]
        together = attachment.samples
    for row, single in enumerate(_rows(inputs, attachment)):
        plain_gap = (_logits(model, single)[0, -1] - plain[row]).abs().max()
        with reduce_tokens(model, reducer) as alone:
            gap = (_logits(model, single)[0, -1] - reduced[row]).abs().max()
        if together[row].images and alone.samples != [together[row]]:
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
    """The language model computes what it computes on the tokens that stay, put together by hand, one sample at a
    time."""
    with reduce_tokens(model, reducer) as attachment:
        reduced = _logits(model, inputs)[:, 0]
        rows = list(_rows(inputs, attachment))
        reductions = [reduce_images(reducer, attachment.family, row) if "pixel_values" in row else [] for row in rows]
    for row, (single, images) in enumerate(zip(rows, reductions, strict=True)):
        _close(
            _literal(model, single, images, reducer),
            reduced[row],
            f"logits of sample {row} against the literal sequence",
        )


def dropping_equals_masking(reducer: TokenReducer, model: PreTrainedModel, inputs: Inputs) -> None:
    """Plain dropping at the projector with original positions equals the full-length model with the dropped tokens
    masked."""
    with reduce_tokens(model, replace(reducer, positions="original")) as attachment:
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


def _call(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def _logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """``(rows, 1, vocabulary)``: the logits that decide the first new token."""
    return _call(model, inputs).logits[:, -1:]


def _generate(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


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


def _literal(model: PreTrainedModel, single: Inputs, images: Sequence[ReducedImage], reducer: TokenReducer) -> Tensor:
    """The last logits of one sample, ``(vocabulary,)``, from embeddings and position ids that are put together by
    hand."""
    ids = single["input_ids"][0]
    embeddings, positions = [], []
    queue = list(images)
    column = 0
    while column < len(ids):
        if ids[column] == model.config.image_token_id:
            image = queue.pop(0)
            if image.features is not None:
                embeddings += list(image.features)
            positions += [column + place for place in image.index.tolist()]
            column += len(image.grid)
        else:
            embeddings.append(model.get_input_embeddings()(ids[column]))
            positions.append(column)
            column += 1
    if reducer.positions == "compact":
        positions = list(range(len(embeddings)))
    with torch.no_grad():
        hidden = model.base_model.language_model(
            inputs_embeds=torch.stack(embeddings)[None],
            attention_mask=torch.ones(1, len(embeddings), dtype=torch.long, device=ids.device),
            position_ids=torch.tensor([positions], device=ids.device),
        ).last_hidden_state
        return model.lm_head(hidden[0, -1])


def _same(expected: Tensor, found: Tensor, what: str) -> None:
    if not torch.equal(expected, found):
        raise InvariantError(f"{what} are not bit-identical")


def _close(expected: Tensor, found: Tensor, what: str) -> None:
    """Equal up to rounding: 1e-5 of the largest value in float32, 64 units of the dtype's precision otherwise."""
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    unit = 1e-5 if expected.dtype == torch.float32 else 64 * torch.finfo(expected.dtype).eps
    if not difference <= unit * largest:
        raise InvariantError(f"{what} differ by {difference:.2e}, where {unit * largest:.2e} is rounding")
