"""CDPruner keeps what the official code keeps, and reads the question by way of CLIP's text tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.attach.clip import clip_space
from tokenreduce.signals import QuestionLikeness
from tokenreduce.testing import prompts
from tokenreduce.testing.clip import SEGMENT, write_clip
from tokenreduce_plugins.cdpruner import CdPruner, diverse, scaled

from .golden import GEOMETRY, Case, cases, random, show

QUESTIONS = ["what colour is the square ?", "how many are there ?", "which shape is red ?"]
LONG = "how many red square are there " * 6


@pytest.mark.parametrize("case", cases("cdpruner"))
def test_official_vectors(case: Case) -> None:
    images, text = (normalize(case.given[name], dim=-1) for name in ("image_embeds", "text_embeds"))
    likeness = images @ text.T
    relevance = scaled(-likeness.mean(dim=-1))  # over the whole batch, as the official code does
    count = case.expected["kept"].shape[1]
    for sample, features in enumerate(case.given["features"]):
        kept = case.expected["kept"][sample].tolist()
        assert sorted(diverse(normalize(features, dim=-1), relevance[sample], count).tolist()) == kept
        if len(images) == 1:
            reducer = CdPruner(count)
            (step,) = reducer.steps(GEOMETRY)
            assert show(reducer, step, features, {step.sees[0]: likeness[sample]}).index.tolist() == kept


def worked(keep: int, **knobs: Any) -> list[int]:
    angles = torch.deg2rad(torch.tensor([0.0, 8, 30, 95, 110, 170, 205, 260, 311]))
    features = torch.stack([angles.cos(), angles.sin(), torch.full((9,), 0.5)], dim=1)
    likeness = torch.deg2rad(torch.tensor([10.0, 20, 30, 40, 50, 60, 70, 80, 85])).cos()[:, None]
    reducer = CdPruner(keep, **knobs)
    (step,) = reducer.steps(GEOMETRY)
    return show(reducer, step, features, {QuestionLikeness(reducer.clip): likeness}).index.tolist()


def test_worked_example() -> None:
    likeness = torch.deg2rad(torch.tensor([10.0, 20, 30, 40, 50, 60, 70, 80, 85])).cos()
    expected = torch.tensor([0, 0.0503, 0.1323, 0.2437, 0.3810, 0.5401, 0.7161, 0.9036, 1.0])
    torch.testing.assert_close(scaled(-likeness), expected, atol=1e-4, rtol=0)
    assert [worked(1), worked(2), worked(3)] == [[8], [6, 8], [4, 6, 8]]


def test_the_sign_matters() -> None:
    assert worked(1, sign=1) == [0]
    with pytest.raises(ValueError, match="sign=0 is not one of -1, 1"):
        CdPruner(sign=0)


def test_more_tokens_than_the_kernel_has_dimensions() -> None:
    picked = diverse(normalize(random(30, 4), dim=-1), torch.ones(30), 20)
    assert len(picked.unique()) == 20


def test_relevance_that_tells_nothing_apart() -> None:
    assert scaled(torch.full((4,), 0.3)).tolist() == [1, 1, 1, 1]


def kept(model: LlavaForConditionalGeneration, clip: Path, question: str | Sequence[str], **inputs: Tensor) -> Any:
    with reduce_tokens(model, "cdpruner", keep=6, clip=str(clip), question=question) as attachment, torch.no_grad():
        model(**inputs)
    return [[list(image.kept) for image in sample.images] for sample in attachment.samples]


def literal(model: LlavaForConditionalGeneration, clip: Path, question: str, pixels: Tensor) -> list[int]:
    """The official steps, with the whole CLIP model: its text tower on segments, its own head on LLaVA's patches."""
    both, ids = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)(question)["input_ids"]
    segments = torch.tensor(ids + [0] * (-len(ids) % SEGMENT)).reshape(-1, SEGMENT)
    mask = (torch.arange(segments.numel()) < len(ids)).long().reshape(-1, SEGMENT)
    with torch.no_grad():
        text = both.get_text_features(input_ids=segments, attention_mask=mask).pooler_output
        states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        image = both.visual_projection(both.vision_model.post_layernorm(states))
        (features,) = model.model.get_image_features(pixels[None]).pooler_output
    cosines = normalize(image, dim=-1) @ normalize(text, dim=-1).T
    picked = diverse(normalize(features, dim=-1), scaled(-cosines.mean(dim=-1)), 6)
    return sorted(picked.tolist())


@pytest.mark.parametrize("question", [QUESTIONS[0], LONG], ids=["one segment", "three segments"])
def test_the_question_is_read_by_the_text_tower(
    llava: LlavaForConditionalGeneration, clip: Path, question: str
) -> None:
    inputs = prompts(llava, [2, 1])
    one, two, three = (literal(llava, clip, question, pixels) for pixels in inputs["pixel_values"])
    assert kept(llava, clip, question, **inputs) == [[one, two], [three]]
    assert len(clip_space(str(clip), torch.device("cpu")).read(LONG).pooled) == 3


def test_every_prompt_has_its_own_question(llava: LlavaForConditionalGeneration, clip: Path) -> None:
    inputs = prompts(llava, [1, 0, 2])
    together = kept(llava, clip, QUESTIONS, **inputs)
    alone = [kept(llava, clip, question, **inputs)[row] for row, question in enumerate(QUESTIONS)]
    assert together == alone
    assert together != kept(llava, clip, QUESTIONS[::-1], **inputs), "the question matters"


def test_questions_that_are_missing_or_do_not_fit_are_refused(llava: LlavaForConditionalGeneration, clip: Path) -> None:
    inputs = prompts(llava, [1, 1])
    with reduce_tokens(llava, "cdpruner", clip=str(clip)) as attachment:
        with pytest.raises(ValueError, match="CdPruner reads the question: pass question= to reduce_tokens"):
            llava(**inputs)
        attachment.question = QUESTIONS
        with pytest.raises(ValueError, match="3 questions do not fit 2 prompts"):
            llava(**inputs)
        attachment.question = QUESTIONS[:2]
        llava(**inputs)
    assert [len(sample.images[0].kept) for sample in attachment.samples] == [4, 4]


def test_nothing_is_loaded_before_a_question_is_asked_about_a_picture(llava: LlavaForConditionalGeneration) -> None:
    with reduce_tokens(llava, "cdpruner", clip="no/such/checkpoint", question=QUESTIONS[0]):
        llava(**prompts(llava, [0]))
        with pytest.raises(ValueError, match="clip='no/such/checkpoint' is no directory of a CLIP model"):
            llava(**prompts(llava, [1]))


def test_a_clip_of_another_encoder_is_refused(llava: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    other = str(write_clip(tmp_path, width=16))
    with (
        reduce_tokens(llava, create("cdpruner", clip=other), question=QUESTIONS[0]),
        pytest.raises(ValueError, match="projects states of width 16, and this model's vision encoder has 32"),
    ):
        llava(**prompts(llava))
