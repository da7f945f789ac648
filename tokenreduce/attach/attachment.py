"""``reduce_tokens``: a context in which a stock model's ``generate`` and ``forward`` see fewer visual tokens."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tokenreduce.attach.decoder import DECODER_SIGNALS, DecoderSite
from tokenreduce.attach.generation import refuse_chunks, translated
from tokenreduce.attach.prompt import Prompt, closed_up, shorten
from tokenreduce.attach.reductions import SampleReduction, with_decoder_steps
from tokenreduce.attach.vision import VISION_SIGNALS, ReducedPicture, VisionSite
from tokenreduce.models.family import ModelFamily, Picture, family_of
from tokenreduce.reducer import (
    AtDecoder,
    AtEncoder,
    AtEncoderOutput,
    AtInput,
    AtProjector,
    Grid,
    Span,
    Step,
    TokenReducer,
    layer_index,
)
from tokenreduce.registry import MODELS, create
from tokenreduce.signals import EncoderAttention, EncoderHidden
from tokenreduce.stopwatch import part

SITES: tuple[type[Step], ...] = (AtInput, AtEncoder, AtEncoderOutput, AtProjector, AtDecoder)
"""In the order in which a picture passes them."""

_PROMPT = "_tokenreduce_prompt"
"""The attribute of a key-value cache that remembers which columns its prompt lost."""

_attached: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_lock = threading.Lock()


@contextmanager
def reduce_tokens(
    model: PreTrainedModel,
    reducer: TokenReducer | str,
    *,
    question: str | Sequence[str] | None = None,
    **knobs: Any,
) -> Iterator[Attachment]:
    """Reduce the visual tokens of ``model`` within this context.

    Inside, ``model.generate`` and ``model`` are called as before, with what the processor made; ``generate`` returns
    the caller's own prompt followed by the new tokens. The logits of a forward call have the shorter length. Outside,
    the model is untouched.

    ``reducer`` is an instance, or a name with its knobs. ``question`` is what the prompts ask, in plain words: one text
    for every prompt of a call, or one for all of them; only a reducer that reads it needs it. Yields the
    :class:`Attachment`, whose ``samples`` tell what was kept. Raises ``ValueError`` where the model cannot host the
    reducer, or already hosts one.

    >>> with reduce_tokens(model, "fopru_row", keep=0.25):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    if isinstance(reducer, str):
        reducer = create(reducer, **knobs)
    elif knobs:
        raise TypeError(
            f"knobs go with a reducer's name; {reducer} is already set up, so {', '.join(knobs)} cannot be set"
        )
    attachment = Attachment(family_of(model, MODELS.usable()), reducer, question)
    with attachment.active():
        yield attachment


class Attachment:
    """A reducer in a model.

    samples:  one :class:`SampleReduction` for every prompt of the last call with pictures.
    prompt:   what was left of those prompts before the language model; None where nothing acts there.
    question: what the prompts of the next call ask, as for :func:`reduce_tokens`; can be set anew before every call.
    """

    def __init__(self, family: ModelFamily, reducer: TokenReducer, question: str | Sequence[str] | None = None) -> None:
        self.family = family
        self.model = family.model
        self.reducer = reducer
        self.question = question
        self.samples: list[SampleReduction] = []
        self._generating: ContextVar[bool] = ContextVar("tokenreduce_generating", default=False)
        self._steps = list(reducer.steps(family.geometry))
        self._refuse_what_cannot_be_hosted()
        inside = [step for step in self._steps if isinstance(step, AtDecoder)]
        self._decoder = DecoderSite(reducer, inside, family.decoder, family.geometry) if inside else None
        self._vision = VisionSite(reducer, family) if len(inside) < len(self._steps) else None
        last = next((step for step in reversed(self._steps) if not isinstance(step, AtDecoder)), None)
        self._compact = last is None or reducer.positions_after(last) == "compact"
        self._entries: list[Tensor] = []
        self._prefill_due = False
        self.prompt: Prompt | None = None

    @property
    def drops_only(self) -> bool:
        """Whether the last call dropped tokens at the projector and merged or resized nothing."""
        steps = [step for sample in self.samples for image in sample.images for step in image.steps]
        return all(step.site == "projector" and not step.merged for step in steps)

    def visual(self, input_ids: Tensor) -> Tensor:
        """Where visual tokens stand, bool as ``input_ids``."""
        return torch.isin(input_ids, input_ids.new_tensor(list(self.family.placeholders.values())))

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
            positions = self._positions(prompt, padding_counts=inputs.get("position_ids") is None)
            inputs = {**inputs, "attention_mask": prompt.mask, "position_ids": positions[..., -new.shape[1] :]}
        else:
            return original(**inputs)
        output = self._run(original, inputs)
        _remember(output, prompt)
        return output

    @torch.no_grad()  # as transformers' own `generate`: nobody can use gradients, and they would keep activations alive
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
            inputs = {**self._gathered(inputs, prompt), "position_ids": self._positions(prompt, padding_counts=False)}
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
        if encoded := inputs.get("mm_encoder_outputs"):
            contained = {
                modality: replace(output, pooler_output=self.family.contained(output.pooler_output, modality))
                for modality, output in encoded.items()
            }
            inputs = {**inputs, "mm_encoder_outputs": contained}
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if self._decoder is None or ids is None or (cache is not None and cache.get_seq_length()):
            return original(**inputs)
        visual = self.visual(ids)
        if not bool(visual.any()):
            return original(**inputs)
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(visual) if mask is None else mask.bool()
        grids = [tuple(image.grid for image in sample.images) for sample in self.samples]
        copies = len(ids) // len(grids)  # beams and returned sequences stand in several rows
        with self._decoder.prefill(visual, valid, [each for each in grids for _ in range(copies)]) as prefill:
            output = original(**inputs)
        if self._prefill_due:
            self._prefill_due = False  # without a cache every step prefills again; the first one is the record
            self.samples = [
                with_decoder_steps(sample, entries, prefill, row * copies, self.family.geometry.decoder_layers)
                for row, (sample, entries) in enumerate(zip(self.samples, self._entries, strict=True))
            ]
        return output

    # What the model gets instead.

    @part("selection")
    def _shortened(self, inputs: dict[str, Any], padding_counts: bool) -> tuple[Prompt, dict[str, Any]]:
        """The prompt that is left, and the inputs of a call on it."""
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError("pictures in a later turn need the whole conversation again: call without past_key_values")
        assert self._vision is not None
        ids, given = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if given is None else given
        pictures = self._vision.reduce(inputs, self._questions(inputs) if self._vision.asks else ())
        rows = self.rows(inputs, [reduced.picture for reduced in pictures])
        left = [reduced.left() for reduced in pictures]
        kept = [
            torch.cat([torch.empty(0, dtype=torch.long), *(places[left[n][0]] for n, places in row)]) for row in rows
        ]
        positions = inputs.get("position_ids")
        if positions is None:
            positions = self.family.positions({**inputs, "attention_mask": mask})
        prompt = shorten(ids, mask, self.visual(ids), kept, positions, self._pad(ids, mask))
        self.prompt = prompt
        self._record(rows, pictures, [entries for _, entries, _ in left], prompt.lengths)

        shortened = {name: value for name, value in inputs.items() if name not in self.family.vision_inputs}
        shortened = self._gathered(shortened, prompt)
        shortened["position_ids"] = self._positions(prompt, padding_counts and inputs.get("position_ids") is None)
        outputs = {}
        for modality in self.family.placeholders:
            features = [
                [left[number][2] for number, _ in row if pictures[number].picture.modality == modality] for row in rows
            ]
            if any(levels for row in features for levels in row):
                outputs[modality] = self.family.outputs(_by_level(features))
        if outputs:
            shortened["mm_encoder_outputs"] = outputs
        return prompt, shortened

    def _gathered(self, inputs: Mapping[str, Any], prompt: Prompt) -> dict[str, Any]:
        """The inputs with everything that has an entry for every token at the remaining columns."""
        result = {
            name: prompt.gather(value)
            if isinstance(value, Tensor) and value.shape == prompt.full.shape and name != "position_ids"
            else value
            for name, value in inputs.items()
        }
        return {**result, "input_ids": prompt.input_ids, "attention_mask": prompt.mask}

    def _positions(self, prompt: Prompt, padding_counts: bool) -> Tensor:
        """Position ids of a shortened prompt.

        ``generate`` does not count padding, and in most models a plain forward call without position ids does: the
        reduced call does likewise.
        """
        counts = padding_counts and self.family.counts_padding
        first = self.family.first_position if padding_counts else 0
        if counts:
            columns = torch.arange(prompt.columns.shape[1], device=prompt.columns.device).expand(prompt.columns.shape)
            return first + (columns if self._compact else prompt.columns)
        if not self._compact:
            return first + prompt.gather(prompt.positions)
        compact = (prompt.mask.long().cumsum(-1) - 1).clamp(min=0)
        if prompt.positions.ndim > 2:
            return first + self._in_space(prompt, compact)
        start = prompt.positions.gather(-1, prompt.full_mask.argmax(-1, keepdim=True))  # a caller's may be any
        return first + start + compact

    def _in_space(self, prompt: Prompt, compact: Tensor) -> Tensor:
        """Positions in space and time, closed up, behind the plain ones ``(rows, shorter)``: ``(4, rows, shorter)``."""
        positions = torch.cat([compact[None], prompt.gather(prompt.positions[1:])])
        for row, visual in enumerate(self.visual(prompt.full)):
            slots = prompt.mask[row] != 0
            positions[1:, row, slots] = closed_up(prompt.positions[1:, row], visual, prompt.columns[row, slots])
        return positions

    def _pad(self, ids: Tensor, mask: Tensor) -> int:
        """The token that stands at padding: the caller's own where there is some."""
        if bool((mask == 0).any()):
            return int(ids[mask == 0][0])
        return self.model.generation_config.pad_token_id or 0

    # What is noted and what is refused.

    def rows(self, inputs: Mapping[str, Any], pictures: Sequence[Picture]) -> list[list[tuple[int, Tensor]]]:
        """For every prompt its pictures, in its own order, each with its number in the call and the columns of its
        placeholders ``(placeholders,)``. Raises ``ValueError`` where placeholders and pictures do not match."""
        ids = inputs["input_ids"].cpu()
        rows: list[list[tuple[int, Tensor]]] = [[] for _ in ids]
        for modality, placeholder in self.family.placeholders.items():
            waiting = [number for number, picture in enumerate(pictures) if picture.modality == modality]
            total = len(waiting)
            for row, prompt in enumerate(ids):
                columns = (prompt == placeholder).nonzero()[:, 0]
                while len(columns) and waiting:
                    needed = len(pictures[waiting[0]].tokens)
                    if needed > len(columns):
                        break
                    rows[row].append((waiting.pop(0), columns[:needed]))
                    columns = columns[needed:]
                if len(columns):
                    has = int((prompt == placeholder).sum())
                    raise ValueError(
                        f"prompt {row} has {has} placeholders, which its {modality}s' visual tokens "
                        f"({', '.join(str(len(picture.tokens)) for picture in pictures)} in this call) do not fill"
                    )
            if waiting:
                raise ValueError(
                    f"the prompts have placeholders for {total - len(waiting)} {modality}s, but there are {total}"
                )
        return [sorted(row, key=lambda each: int(each[1][0])) for row in rows]

    def _questions(self, inputs: Mapping[str, Any]) -> list[str]:
        """What is asked about every picture of a call."""
        rows = self.rows(inputs, self.family.pictures(inputs))
        if self.question is None:
            raise ValueError(f"{type(self.reducer).__name__} reads the question: pass question= to reduce_tokens")
        asked = [self.question] * len(rows) if isinstance(self.question, str) else self.question
        if len(asked) != len(rows):
            raise ValueError(f"{len(asked)} questions do not fit {len(rows)} prompts: give one for each, or one text")
        return [text for _, text in sorted((number, asked[row]) for row, own in enumerate(rows) for number, _ in own)]

    def _record(
        self,
        rows: Sequence[Sequence[tuple[int, Tensor]]],
        pictures: Sequence[ReducedPicture],
        entries: Sequence[Tensor],
        lengths: list[int],
    ) -> None:
        self._prefill_due = self._decoder is not None
        self.samples, self._entries = [], []
        for row, length in zip(rows, lengths, strict=True):
            numbers = [number for number, _ in row]
            tiles = [tile for number in numbers for tile in pictures[number].tiles]
            before = itertools.accumulate((len(pictures[number].tiles) for number in numbers), initial=0)
            own = [_numbered(entries[number], first) for number, first in zip(numbers, before, strict=False)]
            self._entries.append(torch.cat([torch.empty(0, 2, dtype=torch.long), *own]))
            self.samples.append(
                SampleReduction(
                    images=tuple(tile.reduction for tile in tiles),
                    visual_tokens=sum(len(pictures[number].picture.tokens) for number in numbers),
                    entering=len(self._entries[-1]),
                    lengths=(length,) * self.family.geometry.decoder_layers,
                )
            )

    def _reduces(self, inputs: Mapping[str, Any]) -> bool:
        """Whether this call brings pictures and something is to be done to them; an untouched call is noted all the
        same."""
        if not any(inputs.get(name) is not None for name in self.family.vision_inputs):
            return False
        self.family.check_call(inputs)
        if self._vision is None:
            pictures = [ReducedPicture.whole(picture) for picture in self.family.pictures(inputs)]
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
            lengths = (torch.ones_like(ids) if mask is None else mask.long()).sum(-1).tolist()
            rows = self.rows(inputs, [reduced.picture for reduced in pictures])
            self._record(rows, pictures, [reduced.left()[1] for reduced in pictures], lengths)
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
        name, family = type(self.reducer).__name__, type(self.family).__name__
        for step in self._steps:
            if not self.family.hosts(type(step)) and not self._takes_pictures_away(step):
                reason = self.family.unhosted.get(type(step))
                hosted = ", ".join(site.__name__ for site in SITES if self.family.hosts(site))
                raise ValueError(
                    f"{name} acts {type(step).__name__}, which {family} models cannot host"
                    f"{f' ({reason})' if reason else ''}; they host {hosted}"
                )
            total = None if isinstance(step, AtDecoder) else self.family.geometry.tokens
            if total and isinstance(step.keep, int) and step.keep > total:
                raise ValueError(
                    f"keep={step.keep} is more than the {total} visual tokens there are: "
                    "lower it, or give a ratio up to 1.0"
                )
            known = DECODER_SIGNALS if isinstance(step, AtDecoder) else VISION_SIGNALS
            for signal in step.sees:
                if not isinstance(signal, known):
                    raise ValueError(f"{name} asks to see {signal}, which {family} models cannot show")
                if isinstance(signal, EncoderAttention | EncoderHidden):
                    layer_index(signal.layer, self.family.geometry.encoder_layers)
        order = [SITES.index(type(step)) for step in self._steps]
        if order != sorted(order):
            raise ValueError(f"{name}: steps must be in the order of the sites, from the input to the decoder")

    def _takes_pictures_away(self, step: Step) -> bool:
        """Whether nothing is left behind this step, which every model can host."""
        one = Grid(1, 1)
        return isinstance(step, AtInput) and self.reducer.count(step, Span(self.family.geometry, (one,), 1, 1)) == 0


def _numbered(entries: Tensor, first: int) -> Tensor:
    """Entries ``(k, 2)`` whose tiles are counted on from ``first``; special tokens belong to none."""
    return torch.where(entries[:, :1] < 0, entries, entries + entries.new_tensor([first, 0]))


def _by_level(rows: Sequence[Sequence[tuple[Tensor, ...]]]) -> list[list[Tensor]]:
    """For every level of features each prompt's own ``(tokens, dim)``, out of those of its pictures."""
    example = next(levels for row in rows for levels in row if levels)
    return [
        [torch.cat([empty[:0], *(levels[number] for levels in row if levels)]) for row in rows]
        for number, empty in enumerate(example)
    ]


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
