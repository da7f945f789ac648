"""VTW gives what the official code gave, and its search finds the layer that the official search would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import calibrate, reduce_tokens
from tokenreduce.attach.bare import reduce_decoder_tokens
from tokenreduce.reducer import NextLogits, TokenReducer
from tokenreduce.testing import prompts
from tokenreduce_plugins.vtw import Vtw, divergences

from .decoder import UNREDUCED, assert_official, language_model, last_logit_change, run
from .golden import GEOMETRY, Case, assert_equal_floats, cases


@pytest.mark.parametrize("case", cases("e2e_vtw"))
def test_official_model(case: Case) -> None:
    found = run(case, Vtw(layer=case.settings["K"]))
    assert found.index[0].tolist() == []
    assert_official(case, found)


@pytest.mark.parametrize("case", cases("e2e_vtw"))
def test_mistakes_are_noticed(case: Case) -> None:
    sensitivity = case.about["sensitivity"]
    layer = case.settings["K"]
    compacted = last_logit_change(case, run(case, Vtw(layer=layer, positions="compact")))
    assert compacted == pytest.approx(sensitivity["last_token_logit_change_if_positions_were_compacted"], abs=1e-4)
    assert compacted > 1
    unreduced = last_logit_change(case, run(case, UNREDUCED))
    assert unreduced == pytest.approx(sensitivity["last_token_logit_change_without_reduction"], abs=1e-4)
    assert last_logit_change(case, run(case, Vtw(layer=layer + 1))) > 1e-2


def test_worked_example() -> None:
    """Prefix 2, image 9, text 3, K=2: lengths of every layer, positions in decoding."""
    given = {"inputs_embeds": torch.randn(1, 14, 64, generator=torch.Generator().manual_seed(0))}
    expected = {"tokens": torch.zeros(2)}
    found = run(Case({}, given, expected, {"model": "A", "image_span": [2, 11]}), Vtw(layer=2))
    assert found.lengths == [14, 14, 5, 5, 5, 5, 5, 5]
    assert found.decode_positions.tolist() == [[14] * 8]


def next_logits(case: Case, reducer: TokenReducer | None) -> Tensor:
    """The last position's logits of one case of the search, with the image where the official search puts it."""
    model = language_model(case.about["model"])
    embeddings = case.given["inputs_embeds"].float()
    with torch.no_grad():
        if reducer is None:
            return model(inputs_embeds=embeddings).logits[0, -1]
        start = case.about["prefix"]
        with reduce_decoder_tokens(model, reducer, [(start, start + case.about["N"])]):
            return model(inputs_embeds=embeddings).logits[0, -1]


@pytest.mark.parametrize("case", cases("e2e_vtw_search"))
def test_official_divergences(case: Case) -> None:
    full = next_logits(case, None)
    torch.testing.assert_close(full, case.expected["full_last_logits"], atol=2e-5, rtol=0.0)
    assert_equal_floats(divergences(next_logits, case, case.about["candidate_layers"]), case.expected["kl"])


def searched(next_logits: NextLogits, samples: Sequence[Any], depth: int, **settings: Any) -> Vtw:
    return Vtw().calibrated(next_logits, samples, replace(GEOMETRY, decoder_layers=depth), **settings)


def test_official_search() -> None:
    samples = [parameter.values[0] for parameter in cases("e2e_vtw_search")]
    assert searched(next_logits, samples, 8, threshold=0.07) == Vtw(layer=6)
    assert searched(next_logits, samples, 8, threshold=0.05) == Vtw(layer=7)
    with pytest.raises(ValueError, match=r"the least is 0\.048"):
        searched(next_logits, samples, 8)


def with_divergences(values: list[float]) -> NextLogits:
    """A model that knows two words: in full it cannot tell, and withdrawal at layers 5, 6 ... makes it as sure as
    ``values`` say."""
    chance = torch.linspace(0.5, 0.9, 100_001, dtype=torch.float64)
    divergence = chance * (2 * chance).log() + (1 - chance) * (2 * (1 - chance)).log()

    def logits(sample: object, reducer: TokenReducer | None) -> Tensor:
        if reducer is None:
            return torch.zeros(2)
        place = (divergence - values[reducer.layer - 5]).abs().argmin()  # type: ignore[attr-defined]
        return torch.stack([chance[place], 1 - chance[place]]).log()

    return logits


def test_searchs_worked_example() -> None:
    search = with_divergences([0.02, 0.004, 0.003 - 1e-6, 0.0005])
    assert searched(search, [None], 9, threshold=0.003) == Vtw(layer=7)
    assert searched(search, [None], 9, threshold=0.0029) == Vtw(layer=8)


def test_a_search_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to search: 0 samples"):
        searched(with_divergences([0.0]), [], 6)
    with pytest.raises(ValueError, match="layers from first=5 on in a model of 4"):
        searched(with_divergences([0.0]), [None], 4)


def test_the_search_on_a_vision_language_model(llava: LlavaForConditionalGeneration) -> None:
    def logits(inputs: dict[str, Tensor], reducer: TokenReducer | None) -> Tensor:
        with reduce_tokens(llava, reducer or "none"), torch.no_grad():
            return llava(**inputs).logits[0, -1]

    samples = [prompts(llava, seed=seed) for seed in range(2)]
    mean = torch.stack([divergences(logits, sample, range(1, 4)) for sample in samples]).mean(dim=0)
    assert mean.min() > 0
    for threshold, layer in ((mean[0], 1), (mean[1], 2), (mean[2], 3)):  # the later it goes, the less it matters
        found = calibrate(llava, Vtw(positions="compact"), samples, threshold=float(threshold), first=1)
        assert isinstance(found, Vtw) and found.positions == "compact"
        assert calibrate(llava, "vtw", samples, threshold=float(threshold), first=1) == Vtw(layer=layer)


def test_a_method_without_a_search_says_so(llava: LlavaForConditionalGeneration) -> None:
    with pytest.raises(TypeError, match="FastV has nothing to calibrate"):
        calibrate(llava, "fastv", [prompts(llava)])
