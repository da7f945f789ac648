"""Inside the language model: at the input of any decoder layer during prefill.

A pre-hook on every decoder layer shortens the hidden states at a cut (:meth:`DecoderSite._cut`), and hands each layer
behind it position embeddings and a mask of the length that it really has (``_prefilling``). What was cut, a list of
:class:`Stage`, is left on the key-value cache, so that in decoding each layer gets a mask over its own, shorter cache
(``_decoding``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tokenreduce.attach import caches, taps
from tokenreduce.attach.call import Call
from tokenreduce.attach.hooks import HOOKS_RUN_AGAIN, Hook, refuse_checkpoints
from tokenreduce.attach.site import Site
from tokenreduce.attach.stage import Prefill, Stage, columns_of, packed, sighted
from tokenreduce.attach.views import DecoderSight, DecoderWatched, shown
from tokenreduce.models.family import ModelFamily
from tokenreduce.models.stack import cache_of
from tokenreduce.passage import Group, Strand, Taken
from tokenreduce.reducer import AtDecoder
from tokenreduce.stopwatch import part


class DecoderSite(Site):
    """A step acts on the states that its layer is about to take, of all rows of a batch."""

    kind = AtDecoder
    label = "decoder layer"
    name = "language model"
    watched = DecoderWatched
    before = False

    def __init__(self, attachment: Any, steps: Sequence[AtDecoder]) -> None:
        super().__init__(attachment, steps)
        self.stack = self.family.stack
        self.by_layer: dict[int, list[AtDecoder]] = {}
        for step in steps:
            self.by_layer.setdefault(step.decoder_layer(self.family.geometry), []).append(step)
        self._watched = [self.stack.attention(layer) for layer in sorted(self.asked.attention)]

    @classmethod
    def keeping(cls) -> AtDecoder:
        return AtDecoder(layer=0.5, keep=1.0)

    @classmethod
    def refusal(cls, step: Any, family: ModelFamily) -> str | None:
        if step.decoder_layer(family.geometry) == 0:
            return "a step at the input of decoder layer 0 is a step at the projector: use AtProjector"
        return super().refusal(step, family)

    def check(self) -> None:
        if self.stack.kernel == "flex_attention":
            raise ValueError("flex_attention's block masks cannot be shortened: load the model with sdpa attention")
        if HOOKS_RUN_AGAIN:
            refuse_checkpoints(self.stack.layers, self.reducer)

    def modules(self) -> list[nn.Module]:
        return [self.stack.module, *self.stack.layers]

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            before = self._hook(self.stack.module, self._before_stack)
            stack.callback(self.stack.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            for number, layer in enumerate(self.stack.layers):
                hook = self._hook(layer, partial(self._before_layer, number))
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _hook(self, own: nn.Module, act: Any) -> Hook:
        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = Call.of(self.attachment)
            return act(call, args, kwargs) if module is own and call is not None else None

        return Hook(run)

    @contextmanager
    def prefilling(self, call: Call, inputs: dict[str, Any]) -> Iterator[None]:
        """Let the forward call within be a prefill; what it did to every prompt is noted at its end."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        copies = len(ids) // len(call.journeys)  # beams and returned sequences stand in several rows
        strands = [
            Strand.entering(call.journeys[row // copies].copy(), places.nonzero()[:, 0])
            for row, places in enumerate(self.attachment.visual(ids).cpu())
        ]
        call.prefill = prefill = Prefill(valid, strands)
        try:
            with taps.captured(self._watched) as prefill.captured:
                yield
        finally:
            call.prefill = None
        call.inside(prefill, copies)

    def _before_stack(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note positions in space and time, which the layers are not told, and take over from the model what it would
        add to all visual tokens, of which some will be gone by then."""
        positions = kwargs.get("position_ids")
        call.spatial = positions[-3:] if positions is not None and positions.ndim == 3 else None
        if call.prefill is None:
            return None
        call.prefill.deepstack, changed = self.stack.take_deepstack(kwargs)
        return args, dict(changed)

    def _before_layer(self, number: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, kwargs = args[0] if args else kwargs["hidden_states"], dict(kwargs)
        kwargs.pop("hidden_states", None)
        prefill, cache = call.prefill, cache_of(kwargs)
        if prefill is None:
            found = caches.lost(cache)
            stage = next((each for each in reversed(found.stages) if each.layer <= number), None) if found else None
            if stage is None:
                return None
            changed = self._decoding(call, number, stage, cache, hidden, kwargs)
            return ((hidden, *args[1:]), {**kwargs, **changed}) if changed else None
        if number == 0:
            prefill.embeddings, prefill.positions = hidden, kwargs.get("position_ids")
            if cache is not None and not isinstance(cache, DynamicCache):
                raise ValueError(f"a {type(cache).__name__} needs layers of one length: leave the cache at its default")
        if 0 < number <= len(prefill.deepstack):
            hidden = self._added(prefill, prefill.deepstack[number - 1], hidden)
        for step in self.by_layer.get(number, ()):
            hidden = self._cut(call, prefill, step, number, hidden, kwargs)
        stage = prefill.stage(number)
        kwargs = kwargs if stage is None else self._prefilling(prefill, stage, number, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _added(self, prefill: Prefill, level: Tensor, hidden: Tensor) -> Tensor:
        """The states ``(rows, n, dim)`` with what the model adds behind the layer before."""
        level, hidden, stage = level.to(hidden.device, hidden.dtype), hidden.clone(), prefill.last
        for number, row in enumerate(prefill.strands):
            hidden[number, row.slots] += level[number, stage.columns[number, row.slots]]
        return hidden

    # Cutting.

    @part("selection")
    def _cut(
        self, call: Call, prefill: Prefill, step: AtDecoder, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Let the reducer choose in every row, and shorten the hidden states ``(rows, n, dim)``."""
        stage, valid = prefill.last, prefill.last.valid.cpu()
        arguments = self._prefilling(prefill, stage, number, hidden, kwargs) if prefill.stages else kwargs
        sight = partial(DecoderSight, call, self.stack, prefill, number, hidden, arguments, {})
        kept, changed, features = [], [], []
        sights: list[list[Tensor]] = [[] for _ in prefill.strands]
        for place, strand in enumerate(prefill.strands):

            def choose(group: Group, slots: Tensor, place: int = place) -> tuple[Taken, Tensor]:
                tiles = [(each, track) for each, track in enumerate(group.tracks) if track.number >= 0]
                whole = sight(place, [track for _, track in tiles], slots)
                single = any(not signal.joint for signal in step.sees)
                views = [sight(place, [track], slots[group.order[:, 0] == each]) for each, track in tiles if single]
                states = hidden[place, slots.to(hidden.device)]
                geometry, seed = self.family.geometry, partial(call.fingerprint, whole.row, whole.numbers)
                taken = group.select(self.reducer, step, states, geometry, shown(self, step, views, whole), seed)
                if taken.selection.sight is not None:
                    sights[place].append(taken.selection.sight)
                return taken, taken.rows(states)

            stays = valid[place].clone()
            stays[strand.slots] = False
            slots, rows = strand.advance(step.scope, choose)
            stays[strand.slots] = True
            after = stays.long().cumsum(0) - 1
            strand.slots = after[strand.slots]
            kept.append(stays.nonzero()[:, 0])
            changed.append(after[slots])
            features.append(torch.cat([hidden[place, :0], *rows]))
            strand.journey.note(f"{self.label} {number}")
        slots, valid, starts = packed(kept, prefill.valid)
        slots, valid = slots.to(hidden.device), valid.to(hidden.device)
        compact, said = self.reducer.positions_after(step) == "compact", sighted(stage, sights)
        prefill.cut(number, slots, valid, compact, call.spatial, said)
        shorter = hidden.gather(1, slots[..., None].expand(*slots.shape, hidden.shape[-1]))
        for place, (start, strand) in enumerate(zip(starts, prefill.strands, strict=True)):
            strand.slots = strand.slots + start
            shorter[place, changed[place] + start] = features[place]
        return shorter

    # What the layers behind a cut are handed.

    def _prefilling(
        self, prefill: Prefill, stage: Stage, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a layer behind a cut in prefill."""
        mask, given, angles = (kwargs.get(name) for name in ("attention_mask", "position_ids", "position_embeddings"))
        key = (stage.layer, id(stage), id(mask), id(angles))
        if key not in prefill.prepared:
            if stage.compact:
                positions = prefill.first[:, None] + (stage.valid.long().cumsum(-1) - 1).clamp(min=0)
                positions = positions.masked_fill(~stage.valid, 0)
                angles = self.stack.rotary(hidden, positions if stage.spatial is None else stage.spatial, number)
            else:
                positions = prefill.places.gather(1, stage.columns)
                angles = tuple(columns_of(each, stage.columns) for each in kwargs["position_embeddings"])
            prefill.prepared[key] = {
                "position_ids": None if given is None else positions,
                "position_embeddings": angles,
                "attention_mask": stage.mask(mask, self.stack, hidden.dtype),
            }
        return {**kwargs, **prefill.prepared[key]}

    def _decoding(
        self, call: Call, number: int, stage: Stage, cache: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What a layer behind a cut is handed otherwise than the model would, for the tokens that follow."""
        rows, queries = hidden.shape[:2]
        if rows != len(stage.columns):
            raise ValueError(
                f"the cache holds {len(stage.columns)} reduced prompts, and {rows} go on: they cannot be told apart"
            )
        width = stage.columns.shape[1]
        new = cache.get_seq_length(number) - width + queries
        changed = self._moved_up(call, number, stage, new, hidden, kwargs) if stage.moves else {}
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            changed["attention_mask"] = torch.cat([stage.valid.to(mask.dtype), mask[:, -new:]], dim=1)
        elif (
            mask is not None
            or stage.padded
            or stage.sight is not None
            or queries > 1
            or self.stack.slides(number, width + new)
        ):
            slides = cache.layers[number].is_sliding
            allowed = stage.behind(new, queries, self.stack.sliding_window(number), slides)
            changed["attention_mask"] = self.stack.mask(allowed, hidden.dtype)
        return changed

    def _moved_up(
        self, call: Call, number: int, stage: Stage, new: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The positions of the tokens that follow, the same for all layers of one kind behind one cut."""
        angles = kwargs["position_embeddings"]
        last_stage, last_angles, changed = call.moved
        if last_stage is stage and last_angles is angles:
            return dict(changed)
        (rows, queries), given, spatial = hidden.shape[:2], kwargs.get("position_ids"), call.spatial
        if given is None:
            positions = stage.valid.sum(-1)[:, None] + torch.arange(new - queries, new, device=hidden.device)
        else:
            positions = given.expand(rows, -1) - stage.lost[:, None]
        places = positions
        if stage.spatial is not None and spatial is not None:
            places = spatial.expand(-1, rows, -1) - stage.lost[:, None]
        turned = self.stack.rotary(hidden, places, number)
        changed = {"position_ids": None if given is None else positions, "position_embeddings": turned}
        call.moved = stage, angles, changed
        return dict(changed)
