"""Checkpoints load alike from a directory and from the package, as the runtime wants them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaForConditionalGeneration

from tokenreduce.models.loading import EMBEDDED, load, supported_classes
from tokenreduce.testing import tiny_llava
from tokenreduce.testing.checkpoints import write_checkpoint
from tokenreduce.testing.processors import tiny_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_llava()
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return folder


def test_a_directory_gives_the_saved_weights_ready_for_batches(checkpoint: Path) -> None:
    model, processor = load(str(checkpoint))
    assert not model.training
    assert processor.tokenizer.padding_side == "left"
    for name, weights in tiny_llava().state_dict().items():
        assert torch.equal(model.state_dict()[name], weights), name


def test_precision_and_attention_are_the_runtimes(checkpoint: Path) -> None:
    model, _ = load(str(checkpoint), dtype="bfloat16", attention="eager")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_the_embedded_checkpoint_has_144_tokens_and_a_class_token() -> None:
    model, processor = load(EMBEDDED)
    vision = model.config.vision_config
    assert (vision.image_size // vision.patch_size) ** 2 == 144
    assert vision.model_type == "clip_vision_model"
    assert processor.chat_template


def test_padding_shows_all_of_a_wide_picture_and_cropping_its_middle(checkpoint: Path) -> None:
    wide = Image.new("RGB", (96, 48), (255, 255, 255))
    wide.paste((0, 0, 0), (0, 0, 20, 48))  # only the left end, which cropping to the middle loses
    seen = {}
    for do_pad in (None, True, False):
        _, processor = load(str(checkpoint), do_pad=do_pad)
        seen[do_pad] = processor.image_processor(wide, return_tensors="pt")["pixel_values"]
        assert seen[do_pad].shape[-2:] == (48, 48)
    assert torch.equal(seen[None], seen[False])
    assert seen[None].min() > 0
    assert seen[True].min() < -1


def test_what_cannot_be_loaded_is_told_with_a_way_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'/nowhere' is no directory"):
        load("/nowhere")
    with pytest.raises(ValueError, match="unknown dtype 'int3': known: float32"):
        load(str(checkpoint), dtype="int3")
    with pytest.raises(ValueError, match="unknown device 'toaster': known: cpu"):
        load(str(checkpoint), device="toaster")

    class Refusal(RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "401 Client Error")

    def unknown(*_: Any, **__: Any) -> None:
        raise Refusal

    monkeypatch.setattr("tokenreduce.models.loading.HfApi.model_info", unknown)
    with pytest.raises(
        ValueError, match=r"does not give 'nobody/nothing' at revision 'main'[^$]*model\.path=DIRECTORY"
    ):
        load("nobody/nothing")


def test_damaged_weights_are_told(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ValueError, match=r"the checkpoint in model\.path=.* cannot be loaded"):
        load(str(tmp_path))


def test_missing_weights_are_told(checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if name.endswith("linear_1.weight"))]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of LlavaForConditionalGeneration, .*linear_1.weight"):
        load(str(directory))


def test_supported_classes_are_the_families() -> None:
    assert "LlavaForConditionalGeneration" in supported_classes()


def test_settings_of_the_image_processor_are_overridden(checkpoint: Path) -> None:
    _, processor = load(str(checkpoint), image={"image_mean": [0.0, 0.0, 0.0]})
    white = processor.image_processor(Image.new("RGB", (48, 48), "white"), return_tensors="pt")["pixel_values"]
    assert torch.allclose(white[0, 0], torch.tensor(1 / processor.image_processor.image_std[0]))
    with pytest.raises(ValueError, match=r"has no tiles: its settings are .*image_mean"):
        load(str(checkpoint), image={"tiles": 3})


def test_a_kernel_that_a_model_cannot_do_with_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PaliGemma 2 in some versions of transformers."""
    monkeypatch.setattr(PaliGemmaForConditionalGeneration, "_supports_sdpa", False)
    with pytest.raises(ValueError, match=r"attention='sdpa': use runtime\.attention=eager"):
        load(str(write_checkpoint("paligemma2", tmp_path)))
