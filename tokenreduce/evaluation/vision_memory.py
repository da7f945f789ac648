"""Running the vision tower once for several reducers that are all given the same features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

REMEMBERED_BYTES = 256 << 20
"""Features up to this size are kept; the tower runs again for the others."""


class VisionMemory:
    """Remembers what a model's ``get_image_features`` gave for a batch, to the bit.

    Only for reducers that choose after the projector and look at nothing inside the tower, such as the draws of the
    random baseline: what does not run cannot be seen. Never used where time is measured.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._base = model.base_model
        self._features: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        self._room = REMEMBERED_BYTES

    @contextmanager
    def recalled(self, batch: Sequence[str]) -> Iterator[None]:
        """Within this context the model is called with the inputs that these samples always give."""
        original = self._base.get_image_features
        calls = 0

        @wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            options = repr({name: value for name, value in kwargs.items() if not isinstance(value, Tensor)})
            key = (*batch, calls, len(args), options)
            if key in self._features:
                # A new container each time: transformers changes the one that it is given.
                return _copied(self._features[key])
            features = original(*args, **kwargs)
            size = sum(tensor.nbytes for tensor in _tensors(features))
            if isinstance(features, Mapping) and size <= self._room:
                self._room -= size
                self._features[key] = _copied(features)
            return features

        self._base.get_image_features = get_image_features
        try:
            yield
        finally:
            del self._base.get_image_features

    def forget(self) -> None:
        self._features.clear()
        self._room = REMEMBERED_BYTES


def _copied(features: Mapping[str, Any]) -> Any:
    return type(features)(
        **{name: list(value) if isinstance(value, list) else value for name, value in features.items()}
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)
