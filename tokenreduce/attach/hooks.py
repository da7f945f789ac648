"""What stands on a model's modules while a reducer is attached. A copy or a pickle of the model has none of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

HOOKS_RUN_AGAIN = "__call__" in vars(GradientCheckpointingLayer)
"""True where transformers, before 5.23, runs the hooks of a checkpointed layer a second time for its gradients."""


class Hook:
    """A hook of one module. In a copy of the module it becomes one that does nothing."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nothing

    def __reduce__(self) -> Any:
        return _nothing, ()


def nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""


def _nothing() -> Callable[..., None]:
    return nothing


def refuse_checkpoints(layers: Iterable[nn.Module], reducer: object) -> None:
    """Raise ``ValueError`` if gradients are asked for and some layer is checkpointed: it will run again, and without
    what ``reducer`` does in it."""
    if torch.is_grad_enabled() and any(
        getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers
    ):
        raise ValueError(
            f"gradient checkpointing runs layers a second time, where {type(reducer).__name__} would not act: call "
            "model.gradient_checkpointing_disable() first"
        )


class Method:
    """``wrapper(original, inputs)`` in the place of a model's method: every argument goes by its name, however the
    caller passed it. In a copy of the model it becomes the method that the copy's class has."""

    def __init__(self, model: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        self._model, self._name, self._wrapper = model, name, wrapper
        self._original = getattr(model, name)
        self._signature = inspect.signature(self._original)
        kinds = self._signature.parameters.items()
        self._extra = next((key for key, parameter in kinds if parameter.kind is parameter.VAR_KEYWORD), None)
        functools.update_wrapper(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._signature.bind_partial(*args, **kwargs).arguments
        others = inputs.pop(self._extra, {}) if self._extra else {}
        return self._wrapper(self._original, {**inputs, **others})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self._model), self._model)
        return MethodType(getattr(type(copy), self._name), copy)

    def __reduce__(self) -> Any:
        return getattr, (self._model, self._name)


@contextmanager
def replaced(model: nn.Module, wrappers: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Put wrappers in the place of a model's methods, and what was there back at the end.

    Accelerate, for instance, has a ``forward`` of its own on the model, before or from within this context; the latter
    calls what it found as ``_old_forward``.
    """
    own = {name: vars(model)[name] for name in wrappers if name in vars(model)}
    placed = {name: Method(model, name, wrapper) for name, wrapper in wrappers.items()}
    for name, method in placed.items():
        setattr(model, name, method)
    try:
        yield
    finally:
        for name, method in placed.items():
            if vars(model).get(name) is not method:
                if vars(model).get(f"_old_{name}") is method:
                    setattr(model, f"_old_{name}", own.get(name, MethodType(getattr(type(model), name), model)))
            elif name in own:
                setattr(model, name, own[name])
            else:
                delattr(model, name)
