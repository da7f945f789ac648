"""Idefics3 and SmolVLM: an image is cut into tiles of one size with tokens of text between them, and a square of
patches makes one visual token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tokenreduce.models.family import EncodedTile, Inputs, Modality, ModelFamily, Picture, cut_up
from tokenreduce.models.recipe import SQUARE_FRAMES, Ids, Recipe, text_settings, vision_settings
from tokenreduce.models.towers import tower_flops
from tokenreduce.reducer import AtEncoder, AtEncoderOutput, AtInput, Geometry, Grid, Step


class Idefics3(ModelFamily):
    """Idefics3 and SmolVLM. The last tile of an image that was cut up is the whole image.

    A video's frames are pictures of one tile: nothing in the model's inputs but the words between them tells them from
    images, so that what shall see a whole video has to see all pictures of a prompt.
    """

    classes = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    needs: ClassVar[Mapping[str, str]] = {"pixel_attention_mask": "pixel_values"}
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its tiles have the vision tower's size",
        AtEncoder: "its projector needs whole tiles",
        AtEncoderOutput: "its projector makes one visual token of several patches",
    }

    @property
    def geometry(self) -> Geometry:
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return Geometry(
            encoder_layers=config.vision_config.num_hidden_layers,
            decoder_layers=config.text_config.num_hidden_layers,
            feature_layer=config.vision_config.num_hidden_layers - 1,
            class_token=False,
            tokens=side**2,
            patches_per_token=config.scale_factor**2,
        )

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values", "pixel_attention_mask")

    @property
    def decoder(self) -> nn.Module:
        return self.model.base_model.text_model

    @property
    def projector(self) -> nn.Module:
        return self.model.base_model.connector

    def pictures(self, inputs: Inputs) -> list[Picture]:
        config, pixels = self.model.config, inputs["pixel_values"]
        side = pixels.shape[-1] // config.vision_config.patch_size
        places = torch.arange(side * side).view(1, -1, 1)
        patches = self.model.base_model.connector.pixel_shuffle(places, config.scale_factor)[0]
        grid = Grid(side // config.scale_factor, side // config.scale_factor)
        real = pixels[_real(pixels)]
        pictures, first = [], 0
        for prompt in inputs["input_ids"].cpu():
            for rows, columns in _arrangements(prompt, config.image_token_id, len(grid)):
                last = first + rows * columns + 1
                tiles = tuple(
                    EncodedTile(grid, patches, number, None, side * side, *role)
                    for number, role in enumerate(cut_up(grid, rows, columns), start=first)
                )
                tokens = torch.arange(len(tiles) * len(grid))
                pictures.append(Picture("image", tiles, tokens, torch.zeros_like(tokens), real[first:last]))
                first = last
        return pictures

    def encoder_layers(self, modality: Modality = "image") -> Sequence[nn.Module]:
        return self.model.base_model.vision_model.encoder.layers

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        given = {name: inputs[name] for name in self.vision_inputs if inputs.get(name) is not None}
        rows = self.model.base_model.get_image_features(**given, return_dict=True).pooler_output
        sizes = [len(picture.tokens) for picture in self.pictures(inputs)]
        return [(features,) for features in torch.cat(list(rows)).split(sizes)]

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        return torch.cat(list(features))[:, None]  # some versions count features in blocks: here, of one

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        real = _real(inputs["pixel_values"])
        tiles = [tile.sequence for picture in self.pictures(inputs)[pictures] for tile in picture.tiles]
        given = (name for name in self.vision_inputs if inputs.get(name) is not None)
        return {name: inputs[name][real][tiles][None] for name in given}

    def vision_flops(self, patches: int) -> float:
        config, projection = self.model.config, self.model.base_model.connector.modality_projection.proj
        tokens = patches / config.scale_factor**2
        return (
            tower_flops(patches, config.vision_config) + 2 * tokens * projection.in_features * projection.out_features
        )

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        def config(kind: type[PreTrainedConfig], ids: Ids) -> PreTrainedConfig:
            return kind(
                vision_config=vision_settings(),
                text_config=transformers.LlamaConfig(**text_settings()),
                image_token_id=ids["<image>"],
                pad_token_id=ids["<pad>"],
                scale_factor=2,
                tie_word_embeddings=False,
            )

        pictures: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
        tokens = (
            "<image>",
            "<fake_token_around_image>",
            "<global-img>",
            "<end_of_utterance>",
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),  # such pictures have no more tiles
        )
        return {
            "idefics3": Recipe(
                model="Idefics3ForConditionalGeneration",
                processor="Idefics3Processor",
                config=lambda ids: config(transformers.Idefics3Config, ids),
                image_processor=lambda: transformers.Idefics3ImageProcessorPil(**pictures),
                tokens=tokens,
                settings={"image_seq_len": 4},
            ),
            "smolvlm": Recipe(
                model="SmolVLMForConditionalGeneration",
                processor="SmolVLMProcessor",
                config=lambda ids: config(transformers.SmolVLMConfig, ids),
                image_processor=lambda: transformers.SmolVLMImageProcessorPil(**pictures),
                video="<video>",
                tokens=(*tokens, "<video>"),
                settings={"image_seq_len": 4},
                frames={**SQUARE_FRAMES, **pictures},
            ),
        }


def _real(pixels: Tensor) -> Tensor:
    """Which tiles of ``(rows, tiles, channels, height, width)`` are no padding, which the model tells by its zeros."""
    return (pixels != 0).flatten(2).any(-1)


def _arrangements(prompt: Tensor, placeholder: int, each: int) -> list[tuple[int, int]]:
    """Rows and columns of the crops of each image of a prompt, when every tile has ``each`` placeholders; 0 for an
    image that is not cut up.

    Every tile is announced by the same token, and an image is closed by another such token: where two of them stand
    between two tiles, one image ends and the next begins. A row of crops ends where something else, a line break,
    stands before the next tile's announcement.
    """
    columns = (prompt == placeholder).nonzero()[:, 0]
    if not len(columns):
        return []
    mark = prompt[columns[-1] + 1]
    starts, ends = columns[::each].tolist(), columns[each - 1 :: each].tolist()
    gaps = [prompt[end + 1 : start] for end, start in zip(ends, starts[1:], strict=False)]
    last = [number for number, gap in enumerate(gaps) if int((gap == mark).sum()) > 1]
    found = []
    for before, after in pairwise([-1, *last, len(starts) - 1]):
        crops = after - before - 1  # behind them comes the whole image
        rows = sum(bool(gap[0] != mark) for gap in gaps[before + 1 : after - 1]) + 1 if crops else 0
        found.append((rows, crops // max(rows, 1)))
    return found
