"""Every argument of every family's forward call is honoured as the plain model honours it, or refused by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tokenreduce import reduce_tokens
from tokenreduce.models.family import ModelFamily, family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import AtDecoder, AtProjector, Step
from tokenreduce.registry import MODELS
from tokenreduce.testing import Identity
from tokenreduce.testing.checkpoints import ask, picture, recipes, video

Checkpoint = Callable[[str], Path]
SITES: tuple[Step, ...] = (AtProjector(keep=1.0), AtDecoder(layer=1, keep=1.0))

CORE = {
    "attention_mask",
    "cache",
    "input_ids",
    "inputs_embeds",
    "labels",
    "logits_to_keep",
    "mm_encoder_outputs",
    "past_key_values",
    "position_ids",
    "use_cache",
}
"""Arguments of every model, which are no family's affair."""
PER_TOKEN = {"mm_token_type_ids", "token_type_ids"}
"""Arguments with an entry for every token, which are cut as the prompt is."""
WITHOUT_EFFECT = {("internvl", "image_sizes")}
"""Arguments that the plain model of a family takes and makes nothing of."""


def arguments(family: type[ModelFamily]) -> Iterator[str]:
    """The names of all arguments of the family's models."""
    for kind in family.classes:
        parameters = inspect.signature(getattr(transformers, kind).forward).parameters.values()
        yield from (each.name for each in parameters if each.name != "self" and each.kind is not each.VAR_KEYWORD)


class Asked:
    """A model, its family, and a prompt with a picture and, where the model takes one beside it, a video."""

    def __init__(self, name: str, directory: Path) -> None:
        self.model, processor = load(str(directory), attention=recipes()[name].attention)
        self.family = family_of(self.model, MODELS.usable())
        films = [[video(0, 4, 40, 60)]] if "video" in self.family.placeholders else None
        self.inputs: dict[str, Any] = ask(processor, [[picture(0, 30, 90)]], films)

    def held(self, refusal: str | None = None, **changes: Any) -> None:
        """Hold the reduced model to the plain one on changed inputs, where None stands for one that is left out: both
        give the same logits, or both raise. The reduced one may also refuse, if it says ``refusal``."""
        inputs = {name: value for name, value in {**self.inputs, **changes}.items() if value is not None}
        plain = self.outcome(inputs)
        for site in SITES:
            with reduce_tokens(self.model, Identity(site=site)):
                reduced = self.outcome(inputs)
            if isinstance(reduced, Exception):
                refused = isinstance(reduced, ValueError) and refusal and re.search(refusal, str(reduced))
                assert refused or isinstance(plain, Exception), (reduced, site)
            else:
                assert isinstance(plain, Tensor), (plain, site)
                assert torch.equal(plain, reduced), (list(changes), site)

    def outcome(self, inputs: dict[str, Any]) -> Tensor | Exception:
        """The logits for a prompt, or what the model raises."""
        with torch.no_grad():
            try:
                return self.model(**inputs).logits
            except Exception as error:
                return error


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in recipes()])
def asked(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Asked:
    return Asked(request.param, checkpoint(request.param))


@pytest.mark.parametrize("name", MODELS.usable())
def test_every_argument_is_somebodys_affair(name: str) -> None:
    """A new argument of a new transformers shows here: say in the family what becomes of it."""
    kind = MODELS.get(name)
    family: Any = object.__new__(kind)  # these properties are of the family, whatever the model
    known = {*CORE, *PER_TOKEN, *family.vision_inputs, *kind.configured}
    strangers = {each for each in arguments(kind) if each not in known and (name, each) not in WITHOUT_EFFECT}
    assert not strangers, f"{kind.__name__} neither honours nor refuses {', '.join(sorted(strangers))}"
    settings = {each for each in arguments(kind) if each.startswith("vision_")}
    assert settings == set(kind.configured)


def test_another_setting_than_the_configurations_is_refused_by_name(asked: Asked) -> None:
    others = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    for name in asked.family.configured:
        own = getattr(asked.model.config, name)
        other = others[name] if others[name] != own else {"full": "default", -1: -2}[own]
        for site in SITES:
            with reduce_tokens(asked.model, Identity(site=site)):
                for call in (asked.model, asked.model.generate):
                    with pytest.raises(ValueError, match=rf"{name}={other!r}.*model\.config\.{name} = {other!r}"):
                        call(**asked.inputs, **{name: other})


def test_the_configurations_own_setting_can_be_said_again(asked: Asked) -> None:
    own = {name: getattr(asked.model.config, name) for name in asked.family.configured}
    if not own:
        return
    asked.held(**own)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    plain = asked.model.generate(**asked.inputs, **options)
    with reduce_tokens(asked.model, Identity()):
        assert torch.equal(asked.model.generate(**asked.inputs, **own, **options), plain)


def test_an_argument_that_can_be_left_out_is(asked: Asked) -> None:
    for name in set(asked.inputs) - {"input_ids"}:
        asked.held(refusal=rf"\b{name}\b|placeholders", **{name: None})


def test_an_argument_means_what_it_means_to_the_plain_model(asked: Asked) -> None:
    """Other values than the processor's."""
    changes: dict[str, Callable[[Any], Any]] = {
        "pixel_attention_mask": lambda mask: mask.index_fill(-1, torch.arange(mask.shape[-1] // 2), 0),
        "second_per_grid_ts": lambda seconds: torch.as_tensor(seconds) * 30,
        "token_type_ids": torch.zeros_like,
        "mm_token_type_ids": torch.zeros_like,
        "batch_num_images": lambda numbers: numbers + 1,
        "image_sizes": lambda sizes: sizes.flip(-1),
    }
    for name in changes.keys() & asked.inputs.keys():
        asked.held("placeholders", **{name: changes[name](asked.inputs[name])})
    if "image_sizes" in asked.family.vision_inputs:
        asked.held("placeholders", image_sizes=torch.tensor([[30, 80]]))


@pytest.mark.parametrize(("name", "argument"), sorted(WITHOUT_EFFECT))
def test_an_argument_without_effect_has_none(name: str, argument: str, checkpoint: Checkpoint) -> None:
    asked = Asked(name, checkpoint(name))
    given: dict[str, Any] = {argument: torch.tensor([[30, 90]])}
    plain, again = (asked.outcome(inputs) for inputs in (asked.inputs, {**asked.inputs, **given}))
    assert isinstance(plain, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(plain, again)
    asked.held(**given)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_is_computed_for_the_tower_in_advance_reaches_it(name: str, checkpoint: Checkpoint) -> None:
    asked = Asked(name, checkpoint(name))
    patches = len(asked.inputs["pixel_values"])
    asked.held(image_cu_seqlens=torch.tensor([0, 8, patches], dtype=torch.int32))
