"""A site that is no part of the package works by one class and an entry in the list of sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import reduce_tokens
from tokenreduce.attach import sites
from tokenreduce.attach.call import Call
from tokenreduce.attach.groups import selected
from tokenreduce.attach.projector import ProjectorSite
from tokenreduce.attach.site import Site
from tokenreduce.catalog.description import described, hosted
from tokenreduce.counts import Layout, layer_counts
from tokenreduce.models.llava import Llava
from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
    Geometry,
    Grid,
    Selection,
    Step,
    Tile,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.registry import MODELS
from tokenreduce.testing import check_reducer, prompts

PACKAGE = Path(sites.__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class AtHandover(Step):
    """Where the vision side hands its tokens over to the language model: behind whatever acts at the projector."""

    behind_encoder: ClassVar[bool] = True


class HandoverSite(Site):
    """What is left at the projector is chosen from once more."""

    kind = AtHandover
    label = name = "handover"

    def behind_projector(self, call: Call) -> None:
        for step in self.steps:
            tiles = [tile for picture in call.pictures for tile in picture.tiles]
            left = selected(self, call, step, tiles, [tile.features for tile in tiles])
            for tile, features in zip(tiles, left, strict=True):
                tile.features = features


class Reluctant(Llava):
    """A family whose models cannot host it."""

    unhosted: ClassVar[Mapping[type[Step], str]] = {AtHandover: "nothing is ever handed over"}


@dataclass(frozen=True)
class Halves(TokenReducer):
    """Drops every other token at the projector, at the handover and at a layer of the language model."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(keep=0.5), AtHandover(keep=0.25), AtDecoder(layer=2, keep=0.5)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(tokens.best(-tokens.index.float() % 5))


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = sites.SITES.index(ProjectorSite) + 1
    monkeypatch.setattr(sites, "SITES", (*sites.SITES[:before], HandoverSite, *sites.SITES[before:]))
    yield


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_it_runs_and_keeps_the_invariants(llava: Model, positions: str) -> None:
    reducer = Halves().with_positions(positions)  # type: ignore[arg-type]
    for images in ([1], [1, 2, 0]):
        check_reducer(reducer, llava, prompts(llava, images))


def test_records_name_it_and_counts_know_it(llava: Model) -> None:
    with reduce_tokens(llava, Halves()) as attachment:
        llava(**prompts(llava, [1]))
    (sample,) = attachment.samples
    assert [(step.site, len(step.index)) for step in sample.images[0].steps] == [
        ("projector", 18),
        ("handover", 9),
        ("decoder layer 2", 4),
    ]
    geometry, text = attachment.family.geometry, sample.lengths[0] - sample.entering
    counts = layer_counts(Halves(), geometry, Layout((Tile(Grid(6, 6)),)))
    assert counts == (9, 9, 4, 4) == tuple(length - text for length in sample.lengths)


def test_a_family_may_refuse_it(llava: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODELS, "usable", lambda: {"reluctant": Reluctant})
    refusal = r"Halves acts AtHandover, which Reluctant models cannot host \(nothing is ever handed over\); they host"
    with pytest.raises(ValueError, match=refusal), reduce_tokens(llava, Halves()):
        pass


def test_the_catalog_has_it_in_its_place() -> None:
    assert described(Halves())[0] == ("projector", "handover", "language model")
    assert hosted(Llava)[-3:] == ("projector", "handover", "language model")
    assert "handover" not in hosted(Reluctant)


def test_its_steps_must_stand_in_the_order_of_the_sites(llava: Model) -> None:
    class Backwards(Halves):
        def steps(self, geometry: Geometry) -> Sequence[Step]:
            return super().steps(geometry)[1::-1]

    with pytest.raises(ValueError, match="in the order of the sites"), reduce_tokens(llava, Backwards()):
        pass


def test_no_other_part_tells_sites_apart() -> None:
    """Sites are known by their classes, and their names are for people alone."""
    labels = {f'"{word}"' for site in sites.SITES for word in (site.label, site.name)} - {'"input"'}
    for file in PACKAGE.rglob("*.py"):
        text, place = file.read_text(), file.relative_to(PACKAGE)
        if place.parts[0] != "attach":
            assert not [word for word in labels if word in text], place
            for kind in (site.kind.__name__ for site in sites.SITES):
                assert not [line for line in text.splitlines() if "isinstance(" in line and kind in line], place
