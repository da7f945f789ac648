"""``reduce_tokens``: a context in which a stock model's ``generate`` and ``forward`` see fewer visual tokens."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenreduce.attach import caches, masks, refusals, sites
from tokenreduce.attach.call import Call
from tokenreduce.attach.encoding import Tower, begin, enter
from tokenreduce.attach.generation import translated
from tokenreduce.attach.hooks import replaced
from tokenreduce.attach.input import takes_pictures_away
from tokenreduce.attach.prompt import Prompt, positions_of, shorten
from tokenreduce.attach.site import Site
from tokenreduce.models.family import ModelFamily, family_of
from tokenreduce.models.stack import cache_of
from tokenreduce.passage import SampleReduction
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import MODELS, create
from tokenreduce.stopwatch import part

_attached: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_lock = threading.Lock()


@contextmanager
def reduce_tokens(
    model: PreTrainedModel,
    reducer: TokenReducer | type[TokenReducer] | str,
    *,
    question: str | Sequence[str] | None = None,
    processor: Any = None,
    **knobs: Any,
) -> Iterator[Attachment]:
    """Reduce the visual tokens of ``model`` within this context.

    Inside, ``model.generate`` and ``model`` are called as before, with what the processor made; ``generate`` returns
    the caller's own prompt followed by the new tokens. The logits of a forward call have the shorter length. Outside,
    the model is untouched.

    ``reducer`` is an instance, or the name of a method or of a preset, or a class, with its knobs. ``question`` is what
    the prompts ask, in plain words: one text for every prompt of a call, or one for all of them. Only a reducer that
    reads it needs it, and one that does so with the model's own tokenizer needs its ``processor``. Yields the
    :class:`Attachment`, whose ``samples`` tell what was kept. Raises ``ValueError`` where the model cannot host the
    reducer, or already hosts one.

    >>> with reduce_tokens(model, "fopru_row", keep=0.25):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    if not isinstance(reducer, TokenReducer):
        reducer = create(reducer, **knobs)
    elif knobs:
        raise TypeError(
            f"knobs go with a reducer's name; {reducer} is already set up, so {', '.join(knobs)} cannot be set"
        )
    attachment = Attachment(family_of(model, MODELS.usable()), reducer, question, processor)
    with attachment.active():
        yield attachment


class Attachment:
    """A reducer in a model.

    question:  what the prompts of the next call ask, as for :func:`reduce_tokens`; can be set anew before every call.
    processor: the model's, None where nobody gave it.
    """

    def __init__(
        self,
        family: ModelFamily,
        reducer: TokenReducer,
        question: str | Sequence[str] | None = None,
        processor: Any = None,
    ) -> None:
        self.family, self.model = family, family.model
        self.reducer, self.question, self.processor = reducer, question, processor
        self.steps = list(reducer.steps(family.geometry))
        self._refuse_what_cannot_be_hosted()
        by_kind = [(kind, [step for step in self.steps if type(step) is kind.kind]) for kind in sites.SITES]
        self.sites: list[Site] = [kind(self, own) for kind, own in by_kind if own]
        before = [step for step in self.steps if step.decoder_layer(family.geometry) is None]
        self.compact = not before or reducer.positions_after(before[-1]) == "compact"
        self._notes = threading.local()
        self.asks = any(site.asked.asks for site in self.sites)
        self.tower: Tower | None = None
        if before:
            vision = [site.asked for site in self.sites if site.before]
            attention = {layer for asked in vision for layer in asked.attention}
            hidden = {layer for asked in vision for layer in asked.hidden}
            self.tower = Tower(family, attention, hidden, any(site.one_by_one for site in self.sites))
        self.standing = refusals.standing(self)

    @property
    def samples(self) -> list[SampleReduction]:
        """What was done to every prompt of the last call with pictures that this thread finished."""
        return getattr(self._notes, "samples", [])

    @property
    def prompt(self) -> Prompt | None:
        """What was left of those prompts before the language model; None where nothing acts there."""
        return getattr(self._notes, "prompt", None)

    @property
    def drops_only(self) -> bool:
        """True if the last call dropped tokens between the vision encoder and the language model alone, merged nothing
        and kept to raster order."""
        done = [step for sample in self.samples for image in sample.images for step in image.steps]
        raster = all(step.behind_encoder and not (step.ordered and self.compact) for step in self.steps)
        return raster and not any(step.merged for step in done)

    def visual(self, input_ids: Tensor) -> Tensor:
        """Where visual tokens stand, bool as ``input_ids``."""
        return self.family.visual(input_ids)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the reducer into the model; take it out at the end, whatever was raised."""
        refusals.check_model(self)
        with _lock:
            if self.model in _attached:
                raise ValueError(
                    "this model already has a reducer attached: leave that context first, or compose them in one"
                )
            _attached.add(self.model)
        try:
            with ExitStack() as stack:
                if self.tower is not None:
                    stack.enter_context(self.tower.installed(self))
                for site in self.sites:
                    stack.enter_context(site.installed())
                stack.enter_context(replaced(self.model, {"forward": self._forward, "generate": self._generate}))
                yield
        finally:
            with _lock:
                _attached.discard(self.model)

    # The two calls that a caller makes.

    def _forward(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        call = Call.of(self)
        if call is not None and call.generating:
            return self._run(call, original, inputs)
        with Call(self, inputs).current() as call:
            inputs = self._begun(call, inputs)
            if call.prompt is None and (earlier := self._earlier(inputs)) is not None:
                new, call.prompt = inputs["input_ids"].shape[1], earlier
                positions = positions_of(self.family, earlier, padding_counts=inputs.get("position_ids") is None)
                inputs = {**inputs, "attention_mask": earlier.mask, "position_ids": positions[..., -new:]}
            output = self._run(call, original, inputs)
        self._finished(call)
        return output

    @torch.no_grad()  # as transformers' own `generate`: nobody can use gradients, and they would keep activations alive
    def _generate(self, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        if "inputs" in inputs:
            inputs["input_ids"] = inputs.pop("inputs")
        with Call(self, inputs, generating=True).current() as call:
            inputs = self._begun(call, inputs)
            if call.prompt is None and (earlier := self._earlier(inputs)) is not None:
                call.prompt = earlier
                inputs = self._gathered(inputs, earlier)
                inputs["position_ids"] = positions_of(self.family, earlier, padding_counts=False)
            if call.prompt is not None:
                inputs = translated(inputs, call.prompt, self.model.generation_config)
            if inputs.get("input_ids") is not None:
                call.width = inputs["input_ids"].shape[1]
            output = original(**inputs)
        self._finished(call)
        if call.prompt is None:
            return output
        if isinstance(output, Tensor):
            return call.prompt.restore(output)
        output.sequences = call.prompt.restore(output.sequences)
        return output

    def _finished(self, call: Call) -> None:
        if call.rows:
            self._notes.samples, self._notes.prompt = call.samples, call.prompt

    def _begun(self, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        """Bring a call's pictures to the language model; the inputs of a call on what is left of them."""
        refusals.check_call(self, call, inputs)
        if not self.brings_pictures(inputs):
            return inputs
        self.family.check_call(inputs)
        if self.tower is not None:
            return self._shortened(call, inputs)
        self.reduced(call, inputs)
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = masks.of(inputs, self.model.generation_config, call.generating)
        lengths = (mask != 0).sum(-1).tolist()
        call.noted(call.journeys, [(length,) * self.family.geometry.decoder_layers for length in lengths])
        return inputs

    def reduced(self, call: Call, inputs: Mapping[str, Any]) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Bring a call's pictures through the steps before the language model, and into it; what
        :func:`~tokenreduce.attach.encoding.enter` gives."""
        begin(call)
        for site in self.sites:
            inputs = site.before_tower(call, inputs)
        if self.tower is not None:
            self.tower.encode(call, inputs)
        for site in self.sites:
            site.behind_projector(call)
        return enter(call)

    def brings_pictures(self, inputs: Mapping[str, Any]) -> bool:
        return any(inputs.get(name) is not None for name in self.family.vision_inputs)

    def _run(self, call: Call, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """One call of the model's own forward, which is a prefill where it brings visual tokens."""
        cache, ids = cache_of(inputs), inputs.get("input_ids")
        if encoded := inputs.get("mm_encoder_outputs"):
            contained = {
                modality: replace(output, pooler_output=self.family.contained(output.pooler_output, modality))
                for modality, output in encoded.items()
            }
            inputs = {**inputs, "mm_encoder_outputs": contained}
        if not call.rows or ids is None or (cache is not None and cache.get_seq_length()):
            output = original(**inputs)
        elif cache is not None and call.width is not None and ids.shape[1] > call.width and self._inside:
            output = self._speculated(call, original, inputs, call.width)
        else:
            output = self._prefilled(call, original, inputs)
        caches.leave(call, inputs, output)
        return output

    def _prefilled(self, call: Call, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            if bool(self.visual(inputs["input_ids"]).any()):
                for site in self.sites:
                    stack.enter_context(site.prefilling(call, inputs))
            return original(**inputs)

    def _speculated(self, call: Call, original: Callable[..., Any], inputs: dict[str, Any], width: int) -> Any:
        """The first forward call of assisted decoding, which brings tokens guessed behind the prompt: the prompt first,
        so that a method sees that alone, and then the guesses."""
        if inputs.get("output_hidden_states") or inputs.get("output_attentions"):
            raise ValueError(
                "assisted decoding with output_hidden_states or output_attentions does not go with a step inside the "
                "language model: leave them out, or do without the assistant"
            )
        length = inputs["input_ids"].shape[1]
        along = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == length and name != "attention_mask"
        }
        first = {**inputs, **{name: value[..., :width] for name, value in along.items()}}
        behind = {**inputs, **{name: value[..., width:] for name, value in along.items()}}
        if inputs.get("attention_mask") is not None:
            first["attention_mask"] = inputs["attention_mask"][:, :width]
        for name in ("mm_encoder_outputs", *self.family.vision_inputs):
            behind.pop(name, None)
        if "logits_to_keep" in inputs:
            first["logits_to_keep"], behind["logits_to_keep"] = 1, 0
        prompt = self._prefilled(call, original, first)
        caches.leave(call, first, prompt)
        output = original(**behind)
        output.logits = torch.cat([prompt.logits[:, -1:], output.logits], dim=1)
        return output

    @property
    def _inside(self) -> bool:
        """True if something is done inside the language model."""
        return any(not site.before for site in self.sites)

    # What the model gets instead.

    @part("selection")
    def _shortened(self, call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a call on what is left of the prompts."""
        ids, given = inputs["input_ids"], inputs.get("attention_mask")
        mask = masks.of(inputs, self.model.generation_config, call.generating) if given is None else given
        kept, features = self.reduced(call, inputs)
        positions = inputs.get("position_ids")
        if positions is None:
            positions = self.family.positions({**inputs, "attention_mask": mask})
        prompt = shorten(ids, mask, self.visual(ids), kept, positions, self._pad(ids, mask), self.compact)
        call.prompt = prompt
        call.noted(call.journeys, [(length,) * self.family.geometry.decoder_layers for length in prompt.lengths])

        shortened = {name: value for name, value in inputs.items() if name not in self.family.vision_inputs}
        shortened = self._gathered(shortened, prompt)
        counts = not call.generating and inputs.get("position_ids") is None
        shortened["position_ids"] = positions_of(self.family, prompt, counts)
        outputs = {}
        for modality in self.family.placeholders:
            own = [
                [features[number] for number, _ in row if call.pictures[number].picture.modality == modality]
                for row in call.rows
            ]
            if any(levels for row in own for levels in row):
                outputs[modality] = self.family.outputs(_by_level(own))
        if outputs:
            shortened["mm_encoder_outputs"] = outputs
        return shortened

    def _gathered(self, inputs: Mapping[str, Any], prompt: Prompt) -> dict[str, Any]:
        """The inputs with everything that has an entry for every token at the remaining columns."""
        result = {
            name: prompt.gather(value)
            if isinstance(value, Tensor) and value.shape == prompt.full.shape and name != "position_ids"
            else value
            for name, value in inputs.items()
        }
        return {**result, "input_ids": prompt.input_ids, "attention_mask": prompt.mask}

    def _pad(self, ids: Tensor, mask: Tensor) -> int:
        """The token that stands at padding: the caller's own where there is some."""
        if bool((mask == 0).any()):
            return int(ids[mask == 0][0])
        return self.model.generation_config.pad_token_id or 0

    # Later turns.

    def _earlier(self, inputs: Mapping[str, Any]) -> Prompt | None:
        """The prompt that the cache holds shortened, with what the caller writes behind it; None for a plain cache."""
        cache: Any = cache_of(inputs)
        found = caches.lost(cache)
        if found is None or found.prompt is None:
            return None
        new, earlier = inputs["input_ids"], found.prompt
        if (call := Call.of(self)) is not None and call.generating:
            return earlier.extended(new[:, earlier.full.shape[1] :], inputs.get("attention_mask"))
        unseen = cache.get_seq_length() - earlier.columns.shape[1]  # what `generate` wrote since
        return earlier.extended(torch.cat([new.new_zeros(len(new), unseen), new], dim=1), inputs.get("attention_mask"))

    def _refuse_what_cannot_be_hosted(self) -> None:
        name, family = type(self.reducer).__name__, type(self.family).__name__
        kinds = {kind.kind: kind for kind in sites.SITES}
        for step in self.steps:
            if type(step) not in kinds:
                raise ValueError(f"{name} acts {type(step).__name__}, and there is no such site")
            reason = kinds[type(step)].refusal(step, self.family)
            if reason is not None and not takes_pictures_away(self.reducer, step, self.family):
                hosted = ", ".join(kind.__name__ for kind in kinds if kind not in self.family.unhosted)
                raise ValueError(
                    f"{name} acts {type(step).__name__}, which {family} models cannot host ({reason}); they host "
                    f"{hosted}"
                )
            before = step.decoder_layer(self.family.geometry) is None and step.scope == "tile"
            total = self.family.geometry.tokens if before else None
            if total and isinstance(step.keep, int) and step.keep > total:
                raise ValueError(
                    f"keep={step.keep} is more than the {total} visual tokens there are: "
                    "lower it, or give a ratio up to 1.0"
                )
        order = [list(kinds).index(type(step)) for step in self.steps]
        if order != sorted(order):
            raise ValueError(f"{name}: steps must be in the order of the sites, from the input to the decoder")


def _by_level(rows: Sequence[Sequence[tuple[Tensor, ...]]]) -> list[list[Tensor]]:
    """For every level of features each prompt's own ``(tokens, dim)``, out of those of its pictures."""
    example = next(levels for row in rows for levels in row if levels)
    return [
        [torch.cat([empty[:0], *(levels[number] for levels in row if levels)]) for row in rows]
        for number, empty in enumerate(example)
    ]
