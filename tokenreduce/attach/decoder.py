"""Dropping visual tokens inside the language model, at the input of any decoder layer during prefill.

Pre-hooks on the decoder layers shorten the hidden states at a cut, and hand every layer behind it position embeddings
and a mask of the length that it really has. What was cut is remembered on the key-value cache, so that in decoding each
layer gets a mask over its own, shorter cache. Nothing is kept between calls anywhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tokenreduce.attach import taps
from tokenreduce.attach.prompt import closed_up
from tokenreduce.attach.selecting import checked
from tokenreduce.reducer import AtDecoder, Geometry, Grid, Span, TokenReducer, VisualTokens, layer_index
from tokenreduce.signals import (
    Attention,
    DecoderAttention,
    DecoderHidden,
    LookAheadAttention,
    ProjectedFeatures,
    TextEmbeddings,
)
from tokenreduce.stopwatch import part

DECODER_SIGNALS = (DecoderAttention, DecoderHidden, LookAheadAttention, ProjectedFeatures, TextEmbeddings)
"""The signals that a step inside the language model can see."""

_STATE = "_tokenreduce_decoder"
"""The attribute of a key-value cache that remembers what its layers lost."""


@dataclass(frozen=True)
class Stage:
    """The sequence from one cut to the next.

    layer:   the first layer that sees it.
    columns: ``(rows, n)`` long, the column of the whole prompt that every slot stands for; 0 at padding.
    valid:   ``(rows, n)`` bool, false at padding.
    lost:    ``(rows,)`` long, by how much the position ids of what follows become smaller where they close up.
    compact: whether positions close up behind what is gone.
    length:  how wide the whole prompt is.
    spatial: ``(3, rows, n)`` long, closed up positions in space and time, where the model has such.
    """

    layer: int
    columns: Tensor
    valid: Tensor
    lost: Tensor
    compact: bool
    length: int
    spatial: Tensor | None = None

    @cached_property
    def padded(self) -> bool:
        return not bool(self.valid.all())

    @cached_property
    def moves(self) -> bool:
        """Whether what follows has other positions than the model gives it."""
        return self.compact and bool(self.lost.any())


@dataclass
class Row:
    """One sample's visual tokens on their way through the layers.

    grids:  its images.
    slots:  ``(n,)`` where its tokens stand in the current sequence.
    index:  ``(n,)`` their places among those that entered.
    source: for each that entered its place among the current ones, -1 for a dropped one.
    steps:  layer, index, source, and whether rows were merged, for every step so far.
    """

    grids: tuple[Grid, ...]
    slots: Tensor
    index: Tensor
    source: Tensor
    steps: list[tuple[int, Tensor, Tensor, bool]] = field(default_factory=list)
    carried: Any = None


@dataclass
class Prefill:
    """One prefill in progress.

    valid:   ``(rows, length)`` bool, false at padding.
    rows:    every sample's visual tokens as they are now.
    entered: every sample's columns of visual tokens as they were.
    deepstack: what the model adds to the visual tokens behind each of its first layers, ``(rows, length, dim)``.
    """

    valid: Tensor
    rows: list[Row]
    entered: list[Tensor]
    embeddings: Tensor | None = None
    deepstack: list[Tensor] = field(default_factory=list)
    captured: taps.Captures = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    prepared: dict[Hashable, dict[str, Any]] = field(default_factory=dict)

    def stage(self, layer: int) -> Stage | None:
        """The stage that ``layer`` sees, None before the first cut."""
        return next((stage for stage in reversed(self.stages) if stage.layer <= layer), None)


class DecoderSite:
    """The decoder steps of a reducer on one language model.

    ``decoder`` is the module that holds ``layers``, ``norm`` and ``rotary_emb``.
    """

    def __init__(
        self, reducer: TokenReducer, steps: Sequence[AtDecoder], decoder: nn.Module, geometry: Geometry
    ) -> None:
        self.geometry = geometry
        if decoder.config._attn_implementation == "flex_attention":  # type: ignore[union-attr]
            raise ValueError("flex_attention's block masks cannot be shortened: load the model with sdpa attention")
        self.reducer = reducer
        self.decoder: Any = decoder
        self.layers: Sequence[Any] = decoder.layers  # type: ignore[assignment]
        self.steps: dict[int, list[AtDecoder]] = {}
        for step in steps:
            layer = layer_index(step.layer, len(self.layers))
            if layer == 0:
                raise ValueError("a step at the input of decoder layer 0 is a step at the projector: use AtProjector")
            self.steps.setdefault(layer, []).append(step)
        self._prefill: ContextVar[Prefill | None] = ContextVar("tokenreduce_prefill", default=None)
        rotary: Any = decoder.rotary_emb
        self._rotates_by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
        self._last_moved: tuple[Stage | None, Any, dict[str, Any]] = (None, None, {})
        self._spatial: ContextVar[Tensor | None] = ContextVar("tokenreduce_positions", default=None)
        signals = [signal for step in steps for signal in step.sees]
        self._watched = {
            layer_index(signal.layer, len(self.layers)) for signal in signals if isinstance(signal, DecoderAttention)
        }
        self._looks_ahead = sorted(
            layer
            for layer, here in self.steps.items()
            if any(isinstance(signal, LookAheadAttention) for step in here for signal in step.sees)
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand before every decoder layer while this context lasts."""
        with ExitStack() as stack:
            tapped = [self.layers[layer].self_attn for layer in sorted({*self._watched, *self._looks_ahead})]
            stack.enter_context(taps.installed(tapped))
            stack.callback(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True).remove)
            for number, layer in enumerate(self.layers):
                hook = layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    @contextmanager
    def prefill(self, visual: Tensor, valid: Tensor, grids: Sequence[tuple[Grid, ...]]) -> Iterator[Prefill]:
        """Let the forward call within be a prefill whose visual tokens stand at ``visual`` (rows, length) bool."""
        rows = []
        for places, images in zip(visual, grids, strict=True):
            slots = places.nonzero()[:, 0]
            rows.append(Row(images, slots, torch.arange(len(slots), device=slots.device), torch.arange(len(slots))))
        prefill = Prefill(valid, rows, [row.slots for row in rows])
        token = self._prefill.set(prefill)
        try:
            with taps.capture(self.layers[layer].self_attn for layer in self._watched) as prefill.captured:
                yield prefill
        finally:
            self._prefill.reset(token)

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note positions in space and time, which the layers are not told, and take over from the model what it would
        add to all visual tokens, of which some will be gone by then."""
        positions = kwargs.get("position_ids")
        self._spatial.set(positions[-3:] if positions is not None and positions.ndim == 3 else None)
        prefill, added = self._prefill.get(), kwargs.get("deepstack_visual_embeds")
        if prefill is None or added is None:
            return None
        visual = kwargs["visual_pos_masks"]
        for embeddings in added:
            level = embeddings.new_zeros(*visual.shape, embeddings.shape[-1])
            level[visual.to(level.device)] = embeddings
            prefill.deepstack.append(level)
        return args, {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}

    def _deepstack(self, prefill: Prefill, number: int, hidden: Tensor) -> Tensor:
        """The states ``(rows, n, dim)`` before a layer with what the model adds behind the one before it."""
        if not 0 < number <= len(prefill.deepstack):
            return hidden
        level = prefill.deepstack[number - 1].to(hidden.device, hidden.dtype)
        stage = prefill.stages[-1] if prefill.stages else _whole(prefill.valid)
        hidden = hidden.clone()
        for number_of_row, row in enumerate(prefill.rows):
            hidden[number_of_row, row.slots] += level[number_of_row, stage.columns[number_of_row, row.slots]]
        return hidden

    def _hook(self, number: int) -> Callable[..., Any]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, kwargs = args[0] if args else kwargs["hidden_states"], dict(kwargs)
            kwargs.pop("hidden_states", None)
            prefill, cache = self._prefill.get(), kwargs.get("past_key_values")
            if prefill is None:
                stages = getattr(cache, _STATE, None)
                stage = next((each for each in reversed(stages or []) if each.layer <= number), None)
                if stage is None:
                    return None
                changed = self._decoding(number, stage, cache, hidden, kwargs)
                return ((hidden, *args[1:]), {**kwargs, **changed}) if changed else None
            if number == 0:
                prefill.embeddings = hidden
                if cache is not None:
                    if type(cache) is not DynamicCache:
                        raise ValueError(
                            f"a {type(cache).__name__} needs layers of one length: leave the cache at its default"
                        )
                    setattr(cache, _STATE, prefill.stages)
            hidden = self._deepstack(prefill, number, hidden)
            for step in self.steps.get(number, ()):
                hidden = self._cut(prefill, step, number, hidden, kwargs)
            stage = prefill.stage(number)
            return (hidden, *args[1:]), kwargs if stage is None else self._prefilling(
                prefill, stage, number, hidden, kwargs
            )

        return before

    # Cutting.

    @part("selection")
    def _cut(self, prefill: Prefill, step: AtDecoder, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Let the reducer choose in every row, and shorten the hidden states ``(rows, n, dim)``."""
        stage = prefill.stages[-1] if prefill.stages else _whole(prefill.valid)
        look_ahead: list[taps.Captured] = []

        def ahead() -> taps.Captured:
            if not look_ahead:
                settings = self._prefilling(prefill, stage, number, hidden, kwargs) if prefill.stages else kwargs
                look_ahead.append(self._look_ahead(self.layers[number], hidden, settings))
            return look_ahead[0]

        kept, features = [], []
        for number_of_row, row in enumerate(prefill.rows):
            slots = stage.valid[number_of_row].clone()
            if len(row.slots):
                signals = self._signals(prefill, stage, step, number_of_row, hidden, ahead)
                span = Span(self.geometry, row.grids, len(prefill.entered[number_of_row]), len(row.slots))
                tokens = VisualTokens(
                    hidden[number_of_row, row.slots],
                    span,
                    self.reducer.count(step, span),
                    index=row.index,
                    signals=signals,
                    carried=row.carried,
                )
                selection = checked(self.reducer, step, tokens)
                slots[row.slots] = False
                places = row.slots[selection.index.sort().values]
                slots[places] = True
                row.index = row.index[selection.index]
                source = selection.sources(len(tokens))
                row.source = torch.where(row.source < 0, -1, source.cpu()[row.source.clamp(min=0)])
                row.carried = selection.carry
                merged = selection.features is not None
                row.steps.append((number, row.index.cpu(), row.source, merged))
                row.slots = slots.long().cumsum(0)[places] - 1
                features.append(tokens.features[selection.index] if selection.features is None else selection.features)
            else:
                features.append(hidden.new_empty(0, hidden.shape[-1]))
            kept.append(slots.nonzero()[:, 0])
        compact = self.reducer.positions_after(step) == "compact"
        return self._packed(prefill, stage, number, compact, hidden, kept, features, kwargs.get("position_ids"))

    def _packed(
        self,
        prefill: Prefill,
        stage: Stage,
        number: int,
        compact: bool,
        hidden: Tensor,
        kept: Sequence[Tensor],
        features: Sequence[Tensor],
        positions: Tensor | None,
    ) -> Tensor:
        """Gather the slots that stay, padding on the prompt's own side, and open a new stage."""
        rows, width = len(kept), max(len(slots) for slots in kept)
        right = bool(prefill.valid[:, 0].all()) and not bool(prefill.valid.all())
        slots = stage.columns.new_zeros(rows, width)
        valid = stage.valid.new_zeros(rows, width)
        for row, places in enumerate(kept):
            start = 0 if right else width - len(places)
            slots[row, start : start + len(places)] = places
            valid[row, start : start + len(places)] = True
            prefill.rows[row].slots = prefill.rows[row].slots + start
        columns = stage.columns.gather(1, slots).masked_fill(~valid, 0)
        shorter = hidden.gather(1, slots[..., None].expand(rows, width, hidden.shape[-1]))
        for row, replacement in enumerate(features):
            shorter[row, prefill.rows[row].slots] = replacement
        counted = self._counted(prefill.valid, positions)
        lost = counted.amax(-1) - counted.masked_fill(~prefill.valid, torch.iinfo(torch.long).max).amin(-1)
        lost = lost + 1 - valid.sum(-1)
        spatial = self._spatial.get() if compact else None
        if spatial is not None:
            spatial, lost = self._closed_up(prefill, spatial.expand(-1, rows, -1), columns, valid)
        if prefill.stages and prefill.stages[-1].layer == number:
            prefill.stages.pop()  # two steps at one layer leave one stage
        prefill.stages.append(Stage(number, columns, valid, lost, compact, prefill.valid.shape[1], spatial))
        return shorter

    @staticmethod
    def _closed_up(prefill: Prefill, spatial: Tensor, columns: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in space and time ``(3, rows, n)`` without the gaps, and by how much what follows moves up."""
        closed = spatial.new_zeros(len(spatial), *columns.shape)
        for row, own in enumerate(valid):
            visual = torch.zeros_like(prefill.valid[row])
            visual[prefill.entered[row]] = True
            closed[:, row, own] = closed_up(spatial[:, row], visual, columns[row, own])
        before = spatial.masked_fill(~prefill.valid, -1).amax((0, 2))
        return closed, before - closed.masked_fill(~valid, -1).amax((0, 2))

    # What the layers behind a cut are handed.

    def _prefilling(
        self, prefill: Prefill, stage: Stage, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        mask, given, angles = (kwargs.get(name) for name in ("attention_mask", "position_ids", "position_embeddings"))
        key = (stage.layer, id(stage), id(mask), id(angles))
        if key not in prefill.prepared:
            counted = self._counted(prefill.valid, given)
            if stage.compact:
                first = counted.masked_fill(~prefill.valid, torch.iinfo(torch.long).max).amin(-1, keepdim=True)
                positions = first + (stage.valid.long().cumsum(-1) - 1).clamp(min=0)
                positions = positions.masked_fill(~stage.valid, 0)
                angles = self._rotary(hidden, positions if stage.spatial is None else stage.spatial, number)
            else:
                positions = counted.gather(1, stage.columns)
                angles = tuple(_columns(each, stage.columns) for each in kwargs["position_embeddings"])
            prefill.prepared[key] = {
                "position_ids": None if given is None else positions,
                "position_embeddings": angles,
                "attention_mask": self._prefill_mask(mask, stage, hidden),
            }
        return {**kwargs, **prefill.prepared[key]}

    @staticmethod
    def _counted(valid: Tensor, given: Tensor | None) -> Tensor:
        """The position ids of the whole prompt ``(rows, length)``: those that the layers are given, or counted."""
        if given is None:
            return (valid.long().cumsum(-1) - 1).clamp(min=0)
        return given.expand(valid.shape)

    def _rotary(self, hidden: Tensor, positions: Tensor, number: int) -> Any:
        """The rotary embeddings of positions ``(rows, n)`` as layer ``number`` takes them."""
        if self._rotates_by_kind:
            return self.decoder.rotary_emb(hidden, positions, self.decoder.config.layer_types[number])
        return self.decoder.rotary_emb(hidden, positions)

    def _prefill_mask(self, mask: Tensor | None, stage: Stage, hidden: Tensor) -> Tensor | None:
        """The layer's own mask at the remaining rows and columns; slots of padding see themselves alone."""
        if mask is None:
            return None if not stage.padded else self._mask(_causal(stage.valid), hidden.dtype)
        if mask.ndim == 2:
            return stage.valid.to(mask.dtype)
        rows, width = stage.columns.shape
        mask = mask.expand(rows, -1, -1, -1)
        mask = mask.gather(2, stage.columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, stage.columns[:, None, None, :].expand(-1, mask.shape[1], width, -1))
        allowed, refused = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        mask = mask.masked_fill(~stage.valid[:, None, None, :], refused)
        padding = torch.diag_embed(~stage.valid)[:, None]
        return mask.masked_fill(padding, allowed)

    def _decoding(
        self, number: int, stage: Stage, cache: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What a layer behind a cut is handed otherwise than the model would, for the tokens that follow."""
        rows, queries = hidden.shape[:2]
        if rows != len(stage.columns):
            raise ValueError(
                f"the cache holds {len(stage.columns)} reduced prompts, and {rows} go on: they cannot be told apart"
            )
        width = stage.columns.shape[1]
        new = cache.get_seq_length(number) - width + queries
        changed = self._moved_up(number, stage, new, hidden, kwargs) if stage.moves else {}
        mask, window = kwargs.get("attention_mask"), sliding_window(self.decoder, number)
        slides = window is not None and width + new > window
        if mask is not None and mask.ndim == 2:
            changed["attention_mask"] = torch.cat([stage.valid.to(mask.dtype), mask[:, -new:]], dim=1)
        elif mask is not None or stage.padded or queries > 1 or slides:
            valid = torch.cat([stage.valid, stage.valid.new_ones(rows, new)], dim=1)
            allowed = _causal(valid)
            if window is not None:  # counted in the whole prompt
                behind = stage.columns.new_tensor(range(stage.length, stage.length + new)).expand(rows, new)
                columns = torch.cat([stage.columns, behind], dim=1)
                allowed = allowed & (columns[:, :, None] - columns[:, None, :] < window)
                if cache.layers[number].is_sliding:  # the layer's cache holds the last keys alone
                    allowed = allowed[..., -(min(width + new - queries, window - 1) + queries) :]
            changed["attention_mask"] = self._mask(allowed[:, -queries:], hidden.dtype)
        return changed

    def _moved_up(self, number: int, stage: Stage, new: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The positions of the tokens that follow, the same for all layers of one kind behind one cut."""
        angles = kwargs["position_embeddings"]
        last_stage, last_angles, changed = self._last_moved
        if last_stage is stage and last_angles is angles:
            return dict(changed)
        (rows, queries), given = hidden.shape[:2], kwargs.get("position_ids")
        if given is None:
            behind = torch.arange(new - queries, new, device=hidden.device)
            positions = stage.valid.sum(-1)[:, None] + behind
        else:
            positions = given.expand(rows, -1) - stage.lost[:, None]
        spatial = self._spatial.get()
        if stage.spatial is not None and spatial is not None:
            turned = self._rotary(hidden, spatial.expand(-1, rows, -1) - stage.lost[:, None], number)
        else:
            turned = self._rotary(hidden, positions, number)
        changed = {"position_ids": None if given is None else positions, "position_embeddings": turned}
        self._last_moved = stage, angles, changed
        return dict(changed)

    def _mask(self, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask ``(rows, 1, queries, keys)`` in the form that the model's attention kernel takes."""
        allowed = allowed[:, None]
        if self.decoder.config._attn_implementation == "eager":
            return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
                ~allowed, torch.finfo(dtype).min
            )
        return allowed

    # What the reducer may see.

    def _signals(
        self,
        prefill: Prefill,
        stage: Stage,
        step: AtDecoder,
        number: int,
        hidden: Tensor,
        ahead: Callable[[], taps.Captured],
    ) -> Callable[[Hashable], Any]:
        row, valid = prefill.rows[number], stage.valid[number]
        sequence = valid.nonzero()[:, 0]
        place = torch.zeros_like(valid, dtype=torch.long)
        place[sequence] = torch.arange(len(sequence), device=valid.device)
        visual = place[row.slots]
        text = torch.arange(int(place[row.slots.max()]) + 1, len(sequence), device=valid.device)

        def view(captured: taps.Captured | None) -> Attention:
            if captured is None or captured.queries.shape[2] != len(valid):
                raise ValueError(f"{type(self.reducer).__name__} asks to see a layer from before an earlier cut")
            mask = captured.mask
            if mask is not None:
                mask = mask[number if len(mask) > 1 else 0, 0][sequence][:, sequence] if mask.ndim == 4 else None
            return Attention(
                captured.queries[number][:, sequence],
                captured.keys[number][:, sequence],
                captured.values[number][:, sequence],
                captured.scale,
                visual=visual,
                text=text,
                mask=mask,
                causal=mask is None,
                softcap=captured.softcap,
            )

        def value(signal: Hashable) -> Any:
            if signal not in step.sees:
                raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
            match signal:
                case DecoderAttention(layer=layer):
                    calls = prefill.captured[self.layers[layer_index(layer, len(self.layers))].self_attn]
                    return view(calls[-1] if calls else None)
                case LookAheadAttention():
                    return view(ahead())
                case DecoderHidden(normed=normed):
                    states = hidden[number, sequence]
                    return self.decoder.norm(states) if normed else states
                case ProjectedFeatures():
                    return self._entered(prefill, number)[0]
                case TextEmbeddings():
                    return self._entered(prefill, number)[1]
            raise KeyError(f"{signal} does not exist inside the language model")

        return value

    @staticmethod
    def _entered(prefill: Prefill, number: int) -> tuple[Tensor, Tensor]:
        """The row's visual tokens and the text behind them as they entered the language model."""
        assert prefill.embeddings is not None
        entered = prefill.entered[number]
        behind = prefill.valid[number].nonzero()[:, 0]
        return prefill.embeddings[number, entered], prefill.embeddings[number, behind[behind > entered.max()]]

    @staticmethod
    def _look_ahead(layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> taps.Captured:
        """The queries and keys that ``layer`` would compute on these states; its attention itself is not run."""
        with taps.capture([layer.self_attn], stop=True) as found, suppress(taps.Seen):
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=kwargs["position_embeddings"],
                position_ids=kwargs["position_ids"],
                attention_mask=kwargs.get("attention_mask"),
            )
        (captured,) = found[layer.self_attn]
        return captured


def _columns(angles: Tensor, columns: Tensor) -> Tensor:
    """Rotary embeddings ``(rows or 1, length, dim)`` at some columns ``(rows, n)``."""
    return angles.expand(len(columns), -1, -1).gather(1, columns[..., None].expand(-1, -1, angles.shape[-1]))


def sliding_window(decoder: Any, number: int) -> int | None:
    """How many tokens back, itself counted, a token of this layer sees; None where it sees them all."""
    window = getattr(decoder.config, "sliding_window", None)
    kinds = getattr(decoder.config, "layer_types", None)
    return window if kinds is None or kinds[number] == "sliding_attention" else None


def _whole(valid: Tensor) -> Stage:
    """The stage before any cut."""
    columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    return Stage(0, columns, valid, valid.new_zeros(len(valid), dtype=torch.long), False, valid.shape[1])


def _causal(valid: Tensor) -> Tensor:
    """Who may see whom, ``(rows, n, n)`` bool: everything valid up to oneself, and at padding oneself alone."""
    width = valid.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=valid.device).tril()
    return (causal & valid[:, None, :]) | torch.diag_embed(~valid)
