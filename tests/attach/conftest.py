"""Small models of every family, loaded once, with prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from tokenreduce.attach.sites import SITES
from tokenreduce.models.family import family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import Step
from tokenreduce.registry import MODELS
from tokenreduce.testing.checkpoints import ask, picture, recipes

FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in recipes()]


@dataclass
class Family:
    """A family's small model, a prompt with one picture, and a left-padded batch of it with one that has none and one
    that has two."""

    name: str
    path: Path
    model: PreTrainedModel
    processor: Any

    def __post_init__(self) -> None:
        tall, wide, square = picture(0, 60, 40), picture(1, 30, 90), picture(2, 50, 50)
        self.alone: dict[str, Tensor] = ask(self.processor, [[tall]])
        self.batch: dict[str, Tensor] = ask(self.processor, [[tall], [], [square, wide]])
        family = family_of(self.model, MODELS.usable())
        self.sites: tuple[type[Step], ...] = tuple(site.kind for site in SITES if family.hosts(site.kind))

    def again(self) -> PreTrainedModel:
        """Another model of the same weights, whose state is a test's own."""
        return load(str(self.path), attention=recipes()[self.name].attention)[0]


@pytest.fixture(scope="session")
def family_named(checkpoint: Callable[[str], Path]) -> Callable[[str], Family]:
    """A family's small model by the family's name. Shared: tests leave it as they found it."""
    loaded: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in loaded:
            path = checkpoint(name)
            loaded[name] = Family(name, path, *load(str(path), attention=recipes()[name].attention))
        return loaded[name]

    return family


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest, family_named: Callable[[str], Family]) -> Family:
    return family_named(request.param)
