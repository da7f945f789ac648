"""Inside the vision encoder: between the two halves of a layer, or behind it.

A step between the halves shortens what the second half adds to. The layer itself still holds the longer sum; it adds
nothing to that, and its output is replaced by the right one. A class token stays in the sequence and is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.attach.call import Call
from tokenreduce.attach.encoding import Encoding
from tokenreduce.attach.hooks import HOOKS_RUN_AGAIN, Hook, refuse_checkpoints
from tokenreduce.attach.site import Site
from tokenreduce.attach.views import TowerSight, shown
from tokenreduce.models.family import ModelFamily
from tokenreduce.passage import Group
from tokenreduce.reducer import AtEncoder
from tokenreduce.stopwatch import part


class TowerSite(Site):
    """Pictures go through the encoder one by one, since each may lose another number of tokens."""

    kind = AtEncoder
    label = "encoder layer"
    name = "inside the encoder"
    one_by_one = True

    @classmethod
    def keeping(cls) -> AtEncoder:
        return AtEncoder(layer=0.5, keep=1.0)

    @classmethod
    def refusal(cls, step: Any, family: ModelFamily) -> str | None:
        if step.scope != "tile":
            return "the encoder attends within a tile, so its tokens are all that a step inside it can see"
        family.geometry.encoder_layer(step.layer)
        return super().refusal(step, family)

    def check(self) -> None:
        """A checkpointed layer runs again when gradients are computed, and then without the steps inside it."""
        if HOOKS_RUN_AGAIN or any(step.where != "block" for step in self.steps):
            refuse_checkpoints(self.modules(), self.reducer)

    @property
    def by_layer(self) -> dict[int, list[AtEncoder]]:
        """The steps of every layer that has some."""
        found: dict[int, list[AtEncoder]] = {}
        for step in self.steps:
            found.setdefault(self.family.geometry.encoder_layer(step.layer), []).append(step)
        return found

    def modules(self) -> list[nn.Module]:
        return [layer for modality in self.family.placeholders for layer in self.family.encoder_layers(modality)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        steps = self.by_layer
        with ExitStack() as stack:
            for modality in self.family.placeholders:
                for number, layer in enumerate(self.family.encoder_layers(modality)):
                    own = steps.get(number, [])
                    hooks: list[Any] = [
                        layer.register_forward_pre_hook(self._hook(layer, self._weighed), with_kwargs=True)
                    ]
                    if own:
                        behind = self._hook(layer, partial(self._behind, number, own))
                        hooks.append(layer.register_forward_hook(behind, prepend=True))
                    if any(step.where == "attention" for step in own):
                        norm, network = self.family.halves(layer)
                        between = self._hook(norm, partial(self._between, number, own))
                        hooks.append(norm.register_forward_pre_hook(between))
                        hooks.append(network.register_forward_hook(self._hook(network, self._withheld)))
                    for hook in hooks:
                        stack.callback(hook.remove)
            yield

    def _hook(self, own: nn.Module, act: Callable[..., Any]) -> Hook:
        """A hook that acts in a run of the vision tower that belongs to this attachment."""

        def run(module: nn.Module, *args: Any) -> Any:
            call = Call.of(self.attachment)
            if module is not own or call is None or call.encoding is None:
                return None
            return act(call.encoding, *args)

        return Hook(run)

    def _weighed(self, encoding: Encoding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer. Proportional attention: a token that holds several others counts as often."""
        sizes = encoding.tiles[0].track.sizes
        if sizes is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        bias = torch.cat([sizes.new_zeros(int(self.family.geometry.class_token)), sizes.log()])
        bias = bias.to(hidden.dtype).expand(1, 1, hidden.shape[1], hidden.shape[1])
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _between(self, number: int, steps: list[AtEncoder], encoding: Encoding, args: tuple[Tensor]) -> tuple[Tensor]:
        """Before the second half."""
        encoding.merged = self._reduced(encoding, number, "attention", steps, args[0])
        return (encoding.merged,)

    def _withheld(self, encoding: Encoding, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Behind the second half: the layer is to add nothing to its own, longer sum."""
        encoding.update = output
        return output[:, :1] * 0

    def _behind(self, number: int, steps: list[AtEncoder], encoding: Encoding, args: Any, output: Tensor) -> Tensor:
        """Behind the layer."""
        if encoding.merged is not None and encoding.update is not None:
            output = encoding.merged + encoding.update
            encoding.merged = encoding.update = None
        return self._reduced(encoding, number, "block", steps, output)

    @part("selection")
    def _reduced(self, encoding: Encoding, number: int, where: str, steps: list[AtEncoder], hidden: Tensor) -> Tensor:
        """The states ``(1, n, dim)`` behind the steps at one place."""
        call, class_token = encoding.call, int(self.family.geometry.class_token)
        (picture,) = encoding.pictures
        (tile,) = picture.tiles
        for step in steps:
            if step.where != where:
                continue
            group, features = Group(tile.journey, [tile.track]), hidden[0, class_token:]
            view = TowerSight(call, picture.row, tile)
            signals = shown(self, step, [view], view)
            fingerprint = partial(call.fingerprint, picture.row, [tile.track.number])
            taken = group.select(self.reducer, step, features, self.family.geometry, signals, fingerprint)
            tile.journey.note(f"{self.label} {number}", [tile.track])
            rows = taken.rows(features)
            tile.held, tile.patches = len(rows), torch.arange(len(rows))
            hidden = torch.cat([hidden[:, :class_token], rows[None]], dim=1)
        return hidden
