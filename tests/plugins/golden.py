"""Reading the golden vectors, and showing stored tensors to a reducer as the signals that it asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenreduce.reducer import Geometry, Grid, Selection, Span, Step, Tile, TokenReducer, VisualTokens
from tokenreduce.signals import Attention, Rows, TokenSizes

FOLDER = Path(__file__).parents[1] / "golden"

GEOMETRY = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
"""LLaVA-1.5's own."""


@dataclass(frozen=True)
class Case:
    """One case of a vector file. ``about`` is its whole entry in the JSON file."""

    settings: dict[str, Any]
    given: dict[str, Tensor]
    expected: dict[str, Tensor]
    about: dict[str, Any]


def cases(vectors: str) -> list[Any]:
    """Every case of the file ``vectors``, as parameters of a test."""
    tensors = load_file(FOLDER / f"{vectors}.safetensors")
    found = []
    for entry in json.loads((FOLDER / f"{vectors}.json").read_text())["cases"]:
        parts = {
            side: {
                name.split("/")[2]: tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{entry['name']}/{side}/")
            }
            for side in ("in", "out")
        }
        case = Case(entry.get("hyperparameters", {}), parts["in"], parts["out"], entry)
        found.append(pytest.param(case, id=f"{vectors}-{entry['name']}"))
    assert found
    return found


@dataclass(frozen=True)
class Stored(Attention):
    """A view on probabilities ``(heads, rows, keys)`` computed elsewhere, which need not belong to the keys."""

    probabilities: Tensor = field(default_factory=lambda: torch.empty(0), kw_only=True)

    def rows(self, queries: Rows) -> Tensor:
        return self.probabilities[:, [queries] if isinstance(queries, int) else queries]

    def mean(self, queries: Rows | None = None, keys: Rows | None = None) -> Tensor:
        rows = self.rows(self.visual if queries is None else queries)
        return rows.mean(dim=0)[:, self.visual if keys is None else keys]


def stored(
    probabilities: Tensor,
    visual: slice,
    *,
    class_token: int | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    text: Tensor | None = None,
) -> Stored:
    nothing = torch.empty(0)
    return Stored(
        probabilities[..., :0],
        probabilities.mT[..., :0] if keys is None else keys,
        nothing if values is None else values,
        1.0,
        visual,
        class_token,
        text=text,
        probabilities=probabilities,
    )


def show(
    reducer: TokenReducer,
    step: Step,
    features: Tensor,
    signals: dict[Hashable, Any] | None = None,
    *,
    geometry: Geometry = GEOMETRY,
    index: Tensor | None = None,
    entered: int | None = None,
    carried: Any = None,
) -> Selection:
    """Run one step of a reducer, holding it to what it declared and promised."""
    entered = len(features) if entered is None else entered
    span = Span(geometry, (Tile(Grid(1, entered)),), entered, len(features))

    def look(signal: Hashable) -> list[Any]:
        assert signal in step.sees, f"{signal} was not declared"
        assert signals is not None
        return [signals[signal]]

    keep = reducer.count(step, span)
    tokens = VisualTokens(features, span, keep, index=index, signals=look, carried=carried)
    selection = reducer.select(step, tokens)
    least, most = keep if isinstance(keep, tuple) else (keep, keep)
    assert least is None or most is None or least <= len(selection.index) <= most
    if selection.features is not None:
        assert selection.features.shape == (len(selection.index), features.shape[-1])
    assert len(selection.sources(len(features))) == len(features)
    return selection


@dataclass
class Walk:
    """What a whole run left: ``index`` (k,) among the tokens that entered, and ``counts`` after every step."""

    features: Tensor
    index: Tensor
    counts: list[int]


def walk(
    reducer: TokenReducer,
    geometry: Geometry,
    features: Tensor,
    signals: Callable[[Step, Tensor], dict[Hashable, Any]],
) -> Walk:
    """Run all steps as an attachment would; ``signals`` makes a step's signals from the current features."""
    index, carried, sizes = torch.arange(len(features)), None, torch.ones(len(features))
    entered, counts = len(features), []
    for step in reducer.steps(geometry):
        available = {TokenSizes(): sizes, **signals(step, features)}
        selection = show(
            reducer, step, features, available, geometry=geometry, index=index, entered=entered, carried=carried
        )
        index, sizes, carried = index[selection.index], sizes[selection.index], selection.carry
        if selection.size is not None:
            sizes = selection.size
        features = features[selection.index] if selection.features is None else selection.features
        counts.append(len(features))
    return Walk(features, index, counts)


def assert_equal_floats(found: Tensor, expected: Tensor) -> None:
    """Equality to the tolerance of the function-level vectors."""
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
