"""Every reducer on every family that is installed: it keeps the invariants, or is refused with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tokenreduce import available, reduce_tokens
from tokenreduce.models.family import family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import AtDecoder, AtEncoder, AtEncoderOutput, AtProjector, Step, TokenReducer
from tokenreduce.registry import MODELS
from tokenreduce.signals import DecoderAttention, EncoderAttention, EncoderHidden, LookAheadAttention
from tokenreduce.testing import INVARIANTS, Identity
from tokenreduce.testing.checkpoints import ask, picture, recipes, video
from tokenreduce.testing.invariants import (
    counts_are_exact,
    dropping_equals_masking,
    equals_the_literal_sequence,
    neighbours_do_not_matter,
)
from tokenreduce_plugins.baselines import NoImage

Checkpoint = Callable[[str], Path]
REDUCERS = [name for name in available("reducers") if name != "chain"]
ON_VIDEOS = (
    "centerclip",
    "divprune",
    "dtd",
    "evs",
    "fastv",
    "flashvid",
    "fopru_rank",
    "holitom",
    "no_image",
    "pool",
    "quota",
    "random",
    "sparsevlm",
    "vidcom2",
)
"""What a video changes is the family's affair and not the method's."""
THOROUGH = ("fastv", "fopru_rank", "pool")
"""These are held to all invariants on every family, the others to those that reducer and family make up together."""
COUPLED = (counts_are_exact, neighbours_do_not_matter, equals_the_literal_sequence, dropping_equals_masking)
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in recipes()]
PLACES: list[tuple[type[Step], Step]] = [
    (AtEncoder, AtEncoder(layer=1, keep=1.0)),
    (AtEncoder, AtEncoder(layer=1, where="attention", keep=1.0)),
    (AtEncoderOutput, AtEncoderOutput(keep=1.0, sees=(EncoderAttention(),))),
    (AtProjector, AtProjector(keep=1.0, sees=(EncoderAttention(), EncoderHidden()))),
    (AtDecoder, AtDecoder(layer=1, keep=1.0, sees=(DecoderAttention(0), LookAheadAttention()))),
    (AtDecoder, AtDecoder(layer=-1, keep=1.0)),
]
GREEDY: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


class Loaded:
    """A model, a prompt, and batches: three prompts of which one has no picture and one two; and, where it has them,
    videos.

    The invariants run every prompt of a batch alone too.
    """

    def __init__(self, family: str, directory: Path) -> None:
        self.model, processor = load(str(directory), attention=recipes()[family].attention)
        tall, wide, square = picture(0, 60, 40), picture(1, 30, 90), picture(2, 50, 50)
        self.single = ask(processor, [[tall]])
        self.batches = [ask(processor, [[wide], [], [square, tall]])]
        if recipes()[family].frames:
            films = [video(0, 4, 40, 60), video(1, 4, 40, 60)]
            images = [[], [square] if family != "smolvlm" else [], []]  # it has one input for frames and pictures
            self.batches.append(ask(processor, images, [films[:1], films[1:], []]))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[Loaded]:
    yield Loaded(request.param, checkpoint(request.param))


def test_a_class_token_is_announced(loaded: Loaded) -> None:
    family = family_of(loaded.model, MODELS.usable())
    assert family.class_token >= family.geometry.class_token


@pytest.mark.parametrize("name", REDUCERS)
def test_reducer(loaded: Loaded, made: Callable[[str], TokenReducer], name: str) -> None:
    reducer = _of_a_small_tile(made(name))
    if reason := _refusal(loaded.model, reducer):
        with pytest.raises(ValueError, match="cannot host") as refused, reduce_tokens(loaded.model, reducer):
            pass
        assert reason in str(refused.value)
        return
    images, *videos = loaded.batches
    checks = INVARIANTS.values() if name in THOROUGH else COUPLED
    for check in checks:
        check(reducer.with_positions("original"), loaded.model, images)
    for batch in videos if name in ON_VIDEOS else ():
        for check in COUPLED:
            check(reducer, loaded.model, batch)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_keeping_everything_at_any_site_is_bit_identical(loaded: Loaded, positions: Any) -> None:
    family = family_of(loaded.model, MODELS.usable())
    sites = [place for kind, place in PLACES if family.hosts(kind)]
    for batch in [loaded.single, *loaded.batches]:
        plain = loaded.model.generate(**batch, **GREEDY)
        for site in sites:
            with reduce_tokens(loaded.model, Identity(site=site, positions=positions)):
                same = loaded.model.generate(**batch, **GREEDY)
            assert torch.equal(same.sequences, plain.sequences), site
            assert all(map(torch.equal, same.logits, plain.logits)), site


def _of_a_small_tile(reducer: TokenReducer) -> TokenReducer:
    """Half of the tokens where there is a ratio to choose: a published one leaves nothing of 4 tokens."""
    ratio = isinstance(getattr(reducer, "keep", None), float)
    return dataclasses.replace(reducer, keep=0.5) if ratio else reducer  # type: ignore[call-arg]


def _refusal(model: PreTrainedModel, reducer: TokenReducer) -> str:
    """Why the model's family cannot host a reducer; nothing where it can."""
    family = family_of(model, MODELS.usable())
    if isinstance(reducer, NoImage):
        return ""
    steps = [type(step) for step in reducer.steps(family.geometry)]
    reasons = [family.unhosted[step] for step in steps if not family.hosts(step)]
    return reasons[0] if reasons else ""
