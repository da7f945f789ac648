"""Seeing the queries, keys and values of chosen attention layers without changing how attention is computed.

Every stock transformers model calls its attention kernel through ``ALL_ATTENTION_FUNCTIONS``. One wrapper a kernel
stands there
while anything is attached; it hands the tensors of a tapped module to whoever captures in this thread, and calls the
kernel.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Captured:
    """What one call of an attention kernel computed with: queries, keys, values ``(batch, heads, sequence,
    head_dim)``, mask, scale, and the bound of its scores where they have one."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None = None


Captures = dict[nn.Module, list[Captured]]
"""For every module that is captured its calls: one, or one a stretch where a tower computes a packed sequence."""


class Seen(Exception):
    """Raised out of an attention layer whose tensors were wanted and whose result is not."""


_captures: ContextVar[Captures] = ContextVar("tokenreduce_captures")
_stops: ContextVar[bool] = ContextVar("tokenreduce_stops", default=False)
_lock = threading.Lock()
_users: Counter[str] = Counter()
_originals: dict[str, Callable[..., Any]] = {}


@contextmanager
def installed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the attention ``modules`` be captured within; contexts may nest and end in any order, in any thread."""
    kernels: set[str] = {cast(Any, module).config._attn_implementation for module in modules}
    with _lock:
        for kernel in kernels:
            if not _users[kernel]:
                _install(kernel)
            _users[kernel] += 1
    try:
        yield
    finally:
        with _lock:
            for kernel in kernels:
                _users[kernel] -= 1
                if not _users[kernel]:
                    _uninstall(kernel)


@contextmanager
def capture(modules: Iterable[nn.Module], stop: bool = False) -> Iterator[Captures]:
    """Collect what ``modules`` compute with in this thread; the dictionary fills as they run.

    With ``stop`` a module that was seen raises :class:`Seen` instead of computing its attention.
    """
    found: Captures = {module: [] for module in modules}
    captures, stops = _captures.set(found), _stops.set(stop)
    try:
        yield found
    finally:
        _captures.reset(captures)
        _stops.reset(stops)


@contextmanager
def captured(modules: Iterable[nn.Module], stop: bool = False) -> Iterator[Captures]:
    """:func:`capture`, on the kernels that the modules have now."""
    modules = list(modules)
    with installed(modules), capture(modules, stop) as found:
        yield found


def _install(kernel: str) -> None:
    original = _originals[kernel] = _eager if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]

    @functools.wraps(original)
    def tapped(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        found = _captures.get({})
        if module in found:
            scale = options.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            found[module].append(Captured(query, key, value, attention_mask, scale, options.get("softcap")))
            if _stops.get():
                raise Seen
        return original(module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS[kernel] = tapped


def _uninstall(kernel: str) -> None:
    original = _originals.pop(kernel)
    del ALL_ATTENTION_FUNCTIONS[kernel]
    if original is not _eager and ALL_ATTENTION_FUNCTIONS[kernel] is not original:
        ALL_ATTENTION_FUNCTIONS[kernel] = original  # somebody had replaced the kernel before us


def _eager(module: nn.Module, *args: Any, **options: Any) -> Any:
    """The eager kernel, which every modelling file of transformers defines for itself."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **options)
