"""What computing takes, seen from below: how often the processor waits for a device, and the memory of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = "aten::_local_scalar_dense"
"""The operator that copies a number from the device: ``int(tensor)``, ``tensor.item()``, ``if tensor``."""

SHAPES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::bincount"}
"""Operators whose result has a shape that only the device knows."""


class Watching(TorchDispatchMode):
    """Counts, while it is entered, what waits for a device, and the memory of all tensors that are made.

    copies: how many numbers were copied from the device.
    waits:  how often the processor would wait for a device: for these, and for the shapes of results.
    peak:   the most bytes of tensors made within that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.waits = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        masked = name in ("aten::index", "aten::index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        self.copies += name == COPIES
        self.waits += name == COPIES or name in SHAPES or masked
        result = func(*args, **(kwargs or {}))
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _storage(each) not in given:
                self._made(each)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        self._alive[key] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))


def _storage(tensor: Tensor) -> int:
    """What tells a tensor's memory apart from that of others."""
    return tensor.untyped_storage()._cdata
