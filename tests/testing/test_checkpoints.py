"""Tiny checkpoints: every family loads, reads pictures and answers as a real checkpoint does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.vision_utils import get_vision_window_index

from tokenreduce.models.llava import Llava
from tokenreduce.models.processing import processor_of
from tokenreduce.models.recipe import Recipe
from tokenreduce.testing.checkpoints import ask, picture, recipes, video, write_checkpoint

Checkpoint = Callable[[str], Path]


def _answers(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 5) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, -tokens:].tolist()


@pytest.mark.parametrize("family", recipes())
def test_answers_a_batch_of_one_two_and_no_pictures(family: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    model, loading = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values()), "weights were lost or drawn anew"
    processor = processor_of(path)
    tall, wide, square = picture(0, 60, 40), picture(1, 40, 90), picture(2, 50, 50)
    first = ask(processor, [[tall], [], [wide, square]])
    other = ask(processor, [[wide], [], [tall, square]])
    answers, others = _answers(model, first), _answers(model, other)
    assert answers[0] != others[0], "the answer does not depend on the picture"
    assert answers[1] == others[1], "a row without pictures depends on its neighbours"
    again = AutoModelForImageTextToText.from_pretrained(path)
    assert _answers(again, ask(processor_of(path), [[tall], [], [wide, square]])) == answers


@pytest.mark.parametrize("family", [name for name, recipe in recipes().items() if recipe.frames])
def test_answers_about_videos(family: str, checkpoint: Checkpoint) -> None:
    path = checkpoint(family)
    model, processor = AutoModelForImageTextToText.from_pretrained(path), processor_of(path)
    images = [[], [], [picture(3, 50, 50)] if family != "smolvlm" else []]  # SmolVLM has one input for both
    films = [video(0, 4, 40, 60), video(1, 4, 40, 60)]
    answers = _answers(model, ask(processor, images, [films[:1], [], films[1:]]))
    others = _answers(model, ask(processor, images, [films[1:], [], films[:1]]))
    assert answers[0] != others[0], "the answer does not depend on the video"
    assert answers[1] == others[1], "a row without a video depends on its neighbours"


def test_a_seed_makes_a_checkpoint(tmp_path: Path) -> None:
    weights = [write_checkpoint("llava", tmp_path / str(run), seed=run // 2) / "model.safetensors" for run in range(3)]
    same, equal, different = (path.read_bytes() for path in weights)
    assert same == equal
    assert same != different


def test_words_are_in_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = processor_of(write_checkpoint("llava", tmp_path, words=["zebra"])).tokenizer
    assert tokenizer.decode(tokenizer("zebra", add_special_tokens=False)["input_ids"]) == "zebra"


def test_unknown_family_and_too_many_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'flamingo'.*known: gemma3, idefics3"):
        write_checkpoint("flamingo", tmp_path)
    with pytest.raises(ValueError, match=r"do not fit the vocabulary of 192"):
        write_checkpoint("llava", tmp_path, words=[f"name{number}" for number in range(200)])


def test_a_class_that_transformers_lacks_costs_its_family_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Any = type(transformers)
    found = package.__getattr__

    def renamed(module: Any, name: str) -> Any:
        if name == "Gemma3Config":
            raise AttributeError(f"module transformers has no attribute {name}")
        return found(module, name)

    monkeypatch.delitem(vars(transformers), "Gemma3Config", raising=False)
    monkeypatch.setattr(package, "__getattr__", renamed)
    with pytest.raises(AttributeError, match="Gemma3Config"):
        write_checkpoint("gemma3", tmp_path)
    assert write_checkpoint("llava", tmp_path) == tmp_path


class Broken(Llava):
    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        raise ImportError("cannot import name 'LlavaConfig'")


class Derived(Llava):
    """Serves a class of its own, for which it has no recipe."""

    classes = ("DerivedForConditionalGeneration",)


class Bringing(Llava):
    """Serves a class of another package, with a recipe."""

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        return {"brought": super().recipes()["llava_siglip"]}


def test_each_family_brings_its_own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"broken": Broken, "derived": Derived, "bringing": Bringing}
    with pytest.warns(UserWarning, match="'broken' cannot be made: ImportError: cannot import name 'LlavaConfig'"):
        own = recipes(others)
    assert list(own) == ["brought"]
    assert write_checkpoint(own["brought"], tmp_path) == tmp_path


def test_each_family_keeps_its_difficulty(checkpoint: Checkpoint) -> None:
    """What the families are tested for: a checkpoint too small to show it would prove nothing."""
    config = AutoConfig.from_pretrained(checkpoint("qwen2_5_vl")).vision_config
    grid = ask(processor_of(checkpoint("qwen2_5_vl")), [[picture(0, 40, 90)]])["image_grid_thw"]
    order, _ = get_vision_window_index(
        grid, config.spatial_merge_size, config.window_size, config.patch_size, kwargs={}
    )
    assert order.tolist() != sorted(order.tolist()), "no window permutes the patches"
    assert set(range(config.depth)) - set(config.fullatt_block_indexes), "no layer attends in windows"

    for family in ("llava_next", "idefics3", "internvl"):
        processor = processor_of(checkpoint(family))
        shapes = [ask(processor, [[picture(0, *size)]])["pixel_values"].shape for size in ((60, 60), (30, 90))]
        assert shapes[0] != shapes[1], f"{family}: pictures of different shapes have the same tiles"

    gemma = AutoConfig.from_pretrained(checkpoint("gemma3")).text_config
    width = ask(processor_of(checkpoint("gemma3")), [[picture(0, 60, 60)]])["input_ids"].shape[1]
    assert gemma.sliding_window < width, "the window is wider than the prompt"
    assert len(AutoConfig.from_pretrained(checkpoint("qwen3_vl")).vision_config.deepstack_visual_indexes) >= 2
