"""Visual token reduction for vision-language models: compare methods, and use them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenreduce.attach import calibrate, reduce_tokens
    from tokenreduce.registry import available, create

__all__ = ["available", "calibrate", "create", "reduce_tokens"]

_HOMES = {
    "available": "tokenreduce.registry",
    "calibrate": "tokenreduce.attach",
    "create": "tokenreduce.registry",
    "reduce_tokens": "tokenreduce.attach",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: the command answers much without torch, whose import takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenreduce' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
