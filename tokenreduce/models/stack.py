"""The layers of a language model: what whoever runs or interrupts them one by one has to know about them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Arguments = Mapping[str, Any]
"""Keyword arguments of the stack's or of a layer's forward call."""

CACHE = ("cache", "past_key_values")
"""The names of the key-value cache among such arguments: in transformers 5.24 and later, and in those before."""


def cache_of(arguments: Arguments) -> Any:
    """The key-value cache among the arguments of a call of a model, its stack or a layer; None where there is none."""
    return next((arguments[name] for name in CACHE if arguments.get(name) is not None), None)


class DecoderStack:
    """The stack of decoder layers of one language model; a family whose stack differs derives from it.

    module: the one that holds ``layers``, ``norm`` and ``rotary_emb``, as most of transformers' language models have.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        rotary: Any = module.rotary_emb
        self._rotates_by_kind = "layer_type" in inspect.signature(rotary.forward).parameters

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder layers, first to last."""
        return self.module.layers

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self.module.layers)

    @property
    def kernel(self) -> str:
        """The attention kernel that the model runs with now, as transformers names it."""
        return self.module.config._attn_implementation

    def norm(self, states: Tensor) -> Tensor:
        """States ``(..., dim)`` as the final norm hands them to the language model's head."""
        return self.module.norm(states)

    def attention(self, layer: int) -> nn.Module:
        """The self-attention module of a layer."""
        return self.layers[layer].self_attn

    def attention_inputs(self, layer: int, hidden: Tensor, arguments: Arguments) -> dict[str, Any]:
        """What a layer that is called with ``hidden`` ``(rows, n, dim)`` and these arguments calls its attention with,
        but for the cache."""
        return {
            "hidden_states": self.layers[layer].input_layernorm(hidden),
            "position_embeddings": arguments["position_embeddings"],
            "position_ids": arguments["position_ids"],
            "attention_mask": arguments.get("attention_mask"),
        }

    def take_deepstack(self, arguments: Arguments) -> tuple[list[Tensor], Arguments]:
        """What the stack, called with these arguments, adds to the visual tokens behind each of its first layers, as
        ``(rows, length, dim)`` for every such layer, and the arguments with which it adds nothing."""
        return [], arguments

    # Which tokens a layer lets see one another.

    def sliding_window(self, layer: int) -> int | None:
        """How many tokens back, itself counted, a token of this layer sees; None where it sees them all."""
        window = getattr(self.module.config, "sliding_window", None)
        kinds = getattr(self.module.config, "layer_types", None)
        return window if kinds is None or kinds[layer] == "sliding_attention" else None

    def slides(self, layer: int, length: int) -> bool:
        """True if a sequence of ``length`` tokens is longer than this layer's window."""
        window = self.sliding_window(layer)
        return window is not None and length > window

    def mask(self, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        """Who may see whom, ``(rows, queries, keys)`` bool, as a mask ``(rows, 1, queries, keys)`` in the form that the
        attention kernel takes beside states of ``dtype``."""
        allowed = allowed[:, None]
        if self.kernel != "eager":
            return allowed
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return zeros.masked_fill(~allowed, torch.finfo(dtype).min)

    # Rotary positions.

    def rotary(self, hidden: Tensor, positions: Tensor, layer: int) -> Any:
        """The rotary embeddings of positions ``(rows, n)``, or ``(3, rows, n)`` in space and time, as a layer takes
        them beside states of the dtype and device of ``hidden``."""
        if self._rotates_by_kind:
            return self.module.rotary_emb(hidden, positions, self.module.config.layer_types[layer])
        return self.module.rotary_emb(hidden, positions)

    def rotated_back(self, keys: Tensor, by: Tensor | int, layer: int) -> Tensor:
        """A layer's keys ``(heads, n, head_dim)`` as they were ``by`` positions, one number or ``(n,)``, earlier.

        For rotary embeddings that pair the halves of what they rotate, as those of the Llama kind do. With positions in
        space and time all axes move. Of a head only the part that has frequencies is rotated; a scale on the embeddings
        stays.
        """
        frequencies = self._frequencies(layer).to(keys.device, torch.float32)
        angles = torch.as_tensor(by, device=keys.device).expand(keys.shape[-2])[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        width = 2 * len(frequencies)
        first, second = keys[..., :width].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(keys.dtype)
        return torch.cat([turned, keys[..., width:]], dim=-1)

    def _frequencies(self, layer: int) -> Tensor:
        """The rotary frequencies of a layer: ``(rotated part of a head / 2,)``."""
        kind = f"{self.module.config.layer_types[layer]}_" if self._rotates_by_kind else ""
        return getattr(self.module.rotary_emb, f"{kind}inv_freq")
