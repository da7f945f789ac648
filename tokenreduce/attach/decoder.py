"""Dropping visual tokens inside the language model, at the input of any decoder layer during prefill.

Pre-hooks on the decoder layers shorten the hidden states at a cut, and hand every layer behind it position embeddings
and a mask of the length that it really has. What was cut is remembered on the key-value cache, so that in decoding each
layer gets a mask over its own, shorter cache. Nothing is kept between calls anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tokenreduce.attach import taps
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
    lost:    ``(rows,)`` long, how many tokens of each row are gone.
    compact: whether positions close up behind what is gone.
    """

    layer: int
    columns: Tensor
    valid: Tensor
    lost: Tensor
    compact: bool


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
    """

    valid: Tensor
    rows: list[Row]
    entered: list[Tensor]
    embeddings: Tensor | None = None
    captured: dict[nn.Module, taps.Captured | None] = field(default_factory=dict)
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
                return (hidden, *args[1:]), self._decoding(number, stage, cache, hidden, kwargs)
            if number == 0:
                prefill.embeddings = hidden
                if cache is not None:
                    if type(cache) is not DynamicCache:
                        raise ValueError(
                            f"a {type(cache).__name__} needs layers of one length: leave the cache at its default"
                        )
                    setattr(cache, _STATE, prefill.stages)
            for step in self.steps.get(number, ()):
                hidden = self._cut(prefill, step, number, hidden, kwargs)
            stage = prefill.stage(number)
            return (hidden, *args[1:]), kwargs if stage is None else self._prefilling(prefill, stage, hidden, kwargs)

        return before

    # Cutting.

    def _cut(self, prefill: Prefill, step: AtDecoder, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Let the reducer choose in every row, and shorten the hidden states ``(rows, n, dim)``."""
        stage = prefill.stages[-1] if prefill.stages else _whole(prefill.valid)
        look_ahead: list[taps.Captured] = []

        def ahead() -> taps.Captured:
            if not look_ahead:
                settings = self._prefilling(prefill, stage, hidden, kwargs) if prefill.stages else kwargs
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
        return self._packed(prefill, stage, number, compact, hidden, kept, features)

    def _packed(
        self,
        prefill: Prefill,
        stage: Stage,
        number: int,
        compact: bool,
        hidden: Tensor,
        kept: Sequence[Tensor],
        features: Sequence[Tensor],
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
        lost = prefill.valid.sum(-1) - valid.sum(-1)
        if prefill.stages and prefill.stages[-1].layer == number:
            prefill.stages.pop()  # two steps at one layer leave one stage
        prefill.stages.append(Stage(number, columns, valid, lost, compact))
        return shorter

    # What the layers behind a cut are handed.

    def _prefilling(self, prefill: Prefill, stage: Stage, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        key = (stage.layer, id(stage), id(mask))
        if key not in prefill.prepared:
            positions = kwargs["position_ids"].expand(len(stage.columns), -1)
            chosen = self._first(prefill.valid, stage) if stage.compact else stage.columns
            positions = positions.gather(1, chosen)
            prefill.prepared[key] = {
                "position_ids": positions,
                "position_embeddings": self.decoder.rotary_emb(hidden, positions),
                "attention_mask": self._prefill_mask(mask, stage, hidden),
            }
        return {**kwargs, **prefill.prepared[key]}

    @staticmethod
    def _first(valid: Tensor, stage: Stage) -> Tensor:
        """The columns of each row's first tokens, as many as are left: where a shorter prompt would stand."""
        starts = valid.long().argmax(-1, keepdim=True)
        return (starts + (stage.valid.long().cumsum(-1) - 1).clamp(min=0)).masked_fill(~stage.valid, 0)

    def _prefill_mask(self, mask: Tensor | None, stage: Stage, hidden: Tensor) -> Tensor | None:
        """The layer's own mask at the remaining rows and columns; slots of padding see themselves alone."""
        if mask is None:
            return None if bool(stage.valid.all()) else self._mask(_causal(stage.valid), hidden.dtype)
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
        rows, queries = hidden.shape[:2]
        if rows != len(stage.columns):
            raise ValueError(
                f"the cache holds {len(stage.columns)} reduced prompts, and {rows} go on: they cannot be told apart"
            )
        changed: dict[str, Any] = {}
        if stage.compact and bool(stage.lost.any()):
            changed["position_ids"] = kwargs["position_ids"].expand(rows, -1) - stage.lost[:, None]
            changed["position_embeddings"] = self.decoder.rotary_emb(hidden, changed["position_ids"])
        mask = kwargs.get("attention_mask")
        new = cache.get_seq_length(number) - stage.columns.shape[1] + queries
        if mask is not None and mask.ndim == 2:
            changed["attention_mask"] = torch.cat([stage.valid.to(mask.dtype), mask[:, -new:]], dim=1)
        elif mask is not None or not bool(stage.valid.all()) or queries > 1:
            valid = torch.cat([stage.valid, stage.valid.new_ones(rows, new)], dim=1)
            changed["attention_mask"] = self._mask(_causal(valid)[:, -queries:], hidden.dtype)
        return {**kwargs, **changed}

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
            return Attention(
                captured.queries[number][:, sequence],
                captured.keys[number][:, sequence],
                captured.values[number][:, sequence],
                captured.scale,
                visual=visual,
                text=text,
                causal=True,
            )

        def value(signal: Hashable) -> Any:
            if signal not in step.sees:
                raise KeyError(f"{signal} was not declared: list it in the step's `sees`")
            match signal:
                case DecoderAttention(layer=layer):
                    return view(prefill.captured[self.layers[layer_index(layer, len(self.layers))].self_attn])
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
                attention_mask=None,
            )
        captured = found[layer.self_attn]
        assert captured is not None
        return captured


def _whole(valid: Tensor) -> Stage:
    """The stage before any cut."""
    columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    return Stage(0, columns, valid, valid.new_zeros(len(valid), dtype=torch.long), False)


def _causal(valid: Tensor) -> Tensor:
    """Who may see whom, ``(rows, n, n)`` bool: everything valid up to oneself, and at padding oneself alone."""
    width = valid.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=valid.device).tril()
    return (causal & valid[:, None, :]) | torch.diag_embed(~valid)
