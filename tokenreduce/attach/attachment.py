"""``reduce_tokens``: a context in which a stock model's ``generate`` and ``forward`` see fewer visual tokens."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenreduce.attach.decoder import DECODER_SIGNALS, DecoderSite, Prefill
from tokenreduce.attach.generation import refuse_chunks, translated
from tokenreduce.attach.prompt import Prompt, shorten
from tokenreduce.attach.vision import VISION_SIGNALS, ImageReduction, StepReduction, VisionSite
from tokenreduce.models.family import ModelFamily, family_of
from tokenreduce.reducer import AtDecoder, Grid, TokenReducer, layer_index
from tokenreduce.registry import MODELS, create
from tokenreduce.signals import EncoderAttention, EncoderHidden

_PROMPT = "_tokenreduce_prompt"
"""The attribute of a key-value cache that remembers which columns its prompt lost."""

_attached: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_lock = threading.Lock()


@dataclass(frozen=True)
class SampleReduction:
    """What a reducer did to one prompt.

    visual_tokens: how many there were; entering: how many enter the language model;
    lengths: the prompt's length, text included, at the input of every decoder layer.
    """

    images: tuple[ImageReduction, ...]
    visual_tokens: int
    entering: int
    lengths: tuple[int, ...]


@contextmanager
def reduce_tokens(model: PreTrainedModel, reducer: TokenReducer | str, **knobs: Any) -> Iterator[Attachment]:
    """Reduce the visual tokens of ``model`` within this context.

    Inside, ``model.generate`` and ``model`` are called as before, with what the processor made; ``generate`` returns
    the caller's
    own prompt followed by the new tokens. The logits of a forward call have the shorter length. Outside, the model
    is untouched.

    ``reducer`` is an instance, or a name with its knobs. Yields the :class:`Attachment`, whose ``samples`` tell what
    was kept. Raises ``ValueError`` where the model cannot host the reducer, or already hosts one.

    >>> with reduce_tokens(model, "fopru_row", keep=0.25):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    if isinstance(reducer, str):
        reducer = create(reducer, **knobs)
    elif knobs:
        raise TypeError(
            f"knobs go with a reducer's name; {reducer} is already set up, so {', '.join(knobs)} cannot be set"
        )
    attachment = Attachment(family_of(model, MODELS.usable()), reducer)
    with attachment.active():
        yield attachment


class Attachment:
    """A reducer in a model. ``samples`` holds one :class:`SampleReduction` for every prompt of the last call with
    pictures."""

    def __init__(self, family: ModelFamily, reducer: TokenReducer) -> None:
        self.family = family
        self.model = family.model
        self.reducer = reducer
        self.samples: list[SampleReduction] = []
        self._generating: ContextVar[bool] = ContextVar("tokenreduce_generating", default=False)
        self._steps = list(reducer.steps(family.geometry))
        self._refuse_what_cannot_be_hosted()
        inside = [step for step in self._steps if isinstance(step, AtDecoder)]
        self._decoder = DecoderSite(reducer, inside, family.decoder, family.geometry) if inside else None
        self._vision = VisionSite(reducer, family) if len(inside) < len(self._steps) else None
        last = next((step for step in reversed(self._steps) if not isinstance(step, AtDecoder)), None)
        self._compact = last is None or reducer.positions_after(last) == "compact"
        self._images: list[tuple[Grid, ...]] = []
        self._prefill_due = False

    @property
    def drops_only(self) -> bool:
        """Whether the last call dropped tokens at the projector and merged or resized nothing."""
        steps = [step for sample in self.samples for image in sample.images for step in image.steps]
        return all(step.site == "projector" and not step.merged for step in steps)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the reducer into the model; take it out at the end, whatever was raised."""
        with _lock:
            if self.model in _attached:
                raise ValueError(
                    "this model already has a reducer attached: leave that context first, or compose them in one"
                )
            _attached.add(self.model)
        wrapped = {"forward": self._forward, "generate": self._generate}
        own = {name: vars(self.model)[name] for name in wrapped if name in vars(self.model)}
        try:
            with (
                self._vision.installed() if self._vision else nullcontext(),
                self._decoder.installed() if self._decoder else nullcontext(),
            ):
                for name, wrapper in wrapped.items():
                    setattr(self.model, name, method(wrapper, getattr(self.model, name)))
                try:
                    yield
                finally:
                    for name in wrapped:
                        delattr(self.model, name)
                        if name in own:  # accelerate's hooks, for instance, stand on the instance
                            setattr(self.model, name, own[name])
        finally:
            with _lock:
                _attached.discard(self.model)

    # The two calls that a caller makes.

    def _forward(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if self._generating.get():
            return self._run(original, inputs)
        self._refuse_hidden_tokens(inputs)
        cache: Any = inputs.get("past_key_values")
        if self._reduces(inputs):
            self._refuse_what_forward_cannot_do(inputs)
            if self._vision is None:
                return self._run(original, inputs)
            prompt, inputs = self._shortened(inputs, padding_counts=True)
        elif (earlier := getattr(cache, _PROMPT, None)) is not None:
            new = inputs["input_ids"]
            unseen = cache.get_seq_length() - earlier.columns.shape[1]  # what `generate` wrote since
            prompt = earlier.extended(
                torch.cat([new.new_zeros(len(new), unseen), new], dim=1), inputs.get("attention_mask")
            )
            given = inputs.get("position_ids")
            positions = self._positions(prompt, None, padding_counts=given is None)[..., -new.shape[1] :]
            inputs = {**inputs, "attention_mask": prompt.mask, "position_ids": positions}
        else:
            return original(**inputs)
        output = self._run(original, inputs)
        _remember(output, prompt)
        return output

    def _generate(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if "inputs" in inputs:
            inputs["input_ids"] = inputs.pop("inputs")
        self._refuse_hidden_tokens(inputs)
        earlier = getattr(inputs.get("past_key_values"), _PROMPT, None)
        reduces = self._reduces(inputs)
        if reduces:
            refuse_chunks(inputs, self.model.generation_config)
        if reduces and self._vision is not None:
            prompt, inputs = self._shortened(inputs, padding_counts=False)
        elif earlier is not None:
            prompt = earlier.extended(inputs["input_ids"][:, earlier.full.shape[1] :], inputs.get("attention_mask"))
            inputs = {
                **inputs,
                "input_ids": prompt.input_ids,
                "attention_mask": prompt.mask,
                "position_ids": self._positions(prompt, None, padding_counts=False),
            }
        else:
            prompt = None
        token = self._generating.set(True)
        try:
            output = original(
                **(inputs if prompt is None else translated(inputs, prompt, self.model.generation_config))
            )
        finally:
            self._generating.reset(token)
        if prompt is None:
            return output
        if isinstance(output, Tensor):
            return prompt.restore(output)
        _remember(output, prompt)
        output.sequences = prompt.restore(output.sequences)
        return output

    def _run(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """One call of the model's own forward, which is a prefill with decoder steps where it brings visual tokens."""
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if self._decoder is None or ids is None or (cache is not None and cache.get_seq_length()):
            return original(**inputs)
        visual = ids == self.family.placeholder
        if not bool(visual.any()):
            return original(**inputs)
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(visual) if mask is None else mask.bool()
        copies = len(ids) // len(self._images)  # beams and returned sequences stand in several rows
        with self._decoder.prefill(visual, valid, [grids for grids in self._images for _ in range(copies)]) as prefill:
            output = original(**inputs)
        if self._prefill_due:
            self._prefill_due = False  # without a cache every step prefills again; the first one is the record
            self.samples = [
                with_decoder_steps(sample, prefill, row * copies, self.family.geometry.decoder_layers)
                for row, sample in enumerate(self.samples)
            ]
        return output

    # What the model gets instead.

    def _shortened(self, inputs: dict[str, Any], padding_counts: bool) -> tuple[Prompt, dict[str, Any]]:
        """The prompt that is left, and the inputs of a call on it."""
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError("pictures in a later turn need the whole conversation again: call without past_key_values")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        assert self._vision is not None
        images = self._vision.reduce(inputs)
        rows = self._rows(inputs, [image.grid for image in images])
        kept, features = [], []
        for start, end in rows:
            offsets = itertools.accumulate((len(image.grid) for image in images[start:end]), initial=0)
            places = [image.placeholders() + offset for image, offset in zip(images[start:end], offsets, strict=False)]
            kept.append(torch.cat([ids.new_empty(0), *(place.to(ids.device) for place in places)]))
            features.append([image.features for image in images[start:end] if image.features is not None])
        prompt = shorten(ids, mask, self.family.placeholder, kept, self._pad(ids, mask))
        self._record(rows, [(image.grid, image.steps, len(image.index)) for image in images], prompt.lengths)

        shortened = {name: value for name, value in inputs.items() if name not in self.family.vision_inputs}
        shortened["input_ids"] = prompt.input_ids
        shortened["attention_mask"] = prompt.mask
        shortened["position_ids"] = self._positions(prompt, inputs.get("position_ids"), padding_counts)
        if any(features):
            dim = next(row for row in features if row)[0]
            packed = [
                torch.cat([dim.new_empty(0, dim.shape[-1]), *row]) for row in features
            ]  # one entry a row: beams need it
            shortened["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=packed)}
        return prompt, shortened

    def _positions(self, prompt: Prompt, given: Tensor | None, padding_counts: bool) -> Tensor:
        """Position ids of a shortened prompt.

        ``generate`` does not count padding, and a plain forward call without position ids does: the reduced call
        does likewise.
        """
        mask, full_mask = prompt.mask, prompt.full_mask
        if padding_counts and given is None:
            mask, full_mask = torch.ones_like(mask), torch.ones_like(full_mask)
        if self._compact:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)
        return prompt.gather(self.family.positions(prompt.full, full_mask) if given is None else given)

    def _pad(self, ids: Tensor, mask: Tensor | None) -> int:
        """The token that stands at padding: the caller's own where there is some."""
        if mask is not None and bool((mask == 0).any()):
            return int(ids[mask == 0][0])
        return self.model.generation_config.pad_token_id or 0

    # What is noted and what is refused.

    def _rows(self, inputs: Mapping[str, Any], grids: Sequence[Grid]) -> list[tuple[int, int]]:
        """For every prompt, the range of its images. Raises ``ValueError`` where placeholders and images do not
        match."""
        placeholders = (inputs["input_ids"] == self.family.placeholder).sum(-1).tolist()
        rows, image = [], 0
        for row, wanted in enumerate(placeholders):
            start, found = image, 0
            while found < wanted and image < len(grids):
                found += len(grids[image])
                image += 1
            if found != wanted:
                raise ValueError(
                    f"prompt {row} has {wanted} placeholders, which its images' {found} visual tokens do not fill"
                )
            rows.append((start, image))
        if image < len(grids):
            raise ValueError(f"the prompts have placeholders for {image} images, but there are {len(grids)}")
        return rows

    def _record(
        self,
        rows: Sequence[tuple[int, int]],
        images: Sequence[tuple[Grid, Sequence[StepReduction], int]],
        lengths: list[int],
    ) -> None:
        self._images = [tuple(grid for grid, _, _ in images[start:end]) for start, end in rows]
        self._prefill_due = self._decoder is not None
        self.samples = [
            SampleReduction(
                images=tuple(ImageReduction(grid, tuple(steps)) for grid, steps, _ in images[start:end]),
                visual_tokens=sum(len(grid) for grid, _, _ in images[start:end]),
                entering=sum(count for _, _, count in images[start:end]),
                lengths=(length,) * self.family.geometry.decoder_layers,
            )
            for (start, end), length in zip(rows, lengths, strict=True)
        ]

    def _reduces(self, inputs: Mapping[str, Any]) -> bool:
        """Whether this call brings pictures and something is to be done to them; an untouched call is noted all the
        same."""
        if not any(inputs.get(name) is not None for name in self.family.vision_inputs):
            return False
        if self._vision is None:
            grids, mask, ids = self.family.grids(inputs), inputs.get("attention_mask"), inputs["input_ids"]
            lengths = (torch.ones_like(ids) if mask is None else mask.long()).sum(-1).tolist()
            self._record(self._rows(inputs, grids), [(grid, (), len(grid)) for grid in grids], lengths)
        return bool(self._steps)

    def _refuse_hidden_tokens(self, inputs: Mapping[str, Any]) -> None:
        for name in ("inputs_embeds", "mm_encoder_outputs"):
            if inputs.get(name) is not None:
                raise ValueError(
                    f"{name} hides the visual tokens from the reducer: pass input_ids and the pictures instead"
                )

    def _refuse_what_forward_cannot_do(self, inputs: Mapping[str, Any]) -> None:
        if inputs.get("labels") is not None:
            raise ValueError("labels do not fit the shortened sequence: compute the loss from the logits yourself")
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep as indices does not fit the shortened sequence: give a number of last positions"
            )

    def _refuse_what_cannot_be_hosted(self) -> None:
        name, family, family_sites = type(self.reducer).__name__, type(self.family).__name__, self.family.sites
        for step in self._steps:
            if type(step) not in self.family.sites:
                hosted = ", ".join(site.__name__ for site in self.family.sites)
                raise ValueError(
                    f"{name} acts {type(step).__name__}, which {family} models cannot host; they host {hosted}"
                )
            known = DECODER_SIGNALS if isinstance(step, AtDecoder) else VISION_SIGNALS
            for signal in step.sees:
                if not isinstance(signal, known):
                    raise ValueError(f"{name} asks to see {signal}, which {family} models cannot show")
                if isinstance(signal, EncoderAttention | EncoderHidden):
                    layer_index(signal.layer, self.family.geometry.encoder_layers)
        order = [family_sites.index(type(step)) for step in self._steps]
        if order != sorted(order):
            raise ValueError(f"{name}: steps must be in the order of the sites, from the input to the decoder")


def with_decoder_steps(sample: SampleReduction, prefill: Prefill, row: int, layers: int) -> SampleReduction:
    """Add to a sample's record what was cut inside the language model, and the lengths that its layers saw."""
    images, entered = [], 0
    for image in sample.images:
        kept, before = image.kept, (image.steps[-1].source if image.steps else range(len(image.grid)))
        places = range(entered, entered + len(kept))
        steps = list(image.steps)
        for layer, index, source, merged in prefill.rows[row].steps:
            inside = tuple(kept[place - entered] for place in index.tolist() if place in places)
            into = tuple(-1 if old < 0 else int(source[entered + old]) for old in before)
            steps.append(StepReduction(f"decoder layer {layer}", inside, into, merged))
        entered += len(kept)
        images.append(replace(image, steps=tuple(steps)))
    full = int(prefill.valid[row].sum())
    stages = [prefill.stage(layer) for layer in range(layers)]
    lengths = tuple(full if stage is None else int(stage.valid[row].sum()) for stage in stages)
    return replace(sample, images=tuple(images), lengths=lengths)


def method(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapper(original, inputs)`` as a method: every argument goes by its name, however the caller passed it."""
    signature = inspect.signature(original)
    extra = next(name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        inputs = signature.bind_partial(*args, **kwargs).arguments
        others = inputs.pop(extra, {})
        return wrapper(original, {**inputs, **others})

    return call


def _remember(output: Any, prompt: Prompt) -> None:
    """Leave the prompt on the key-value cache, so that a later turn can be translated."""
    for value in output.values() if isinstance(output, Mapping) else output:
        if isinstance(value, Cache):
            setattr(value, _PROMPT, prompt)
