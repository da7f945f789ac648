"""What the vision towers that several families share have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from tokenreduce.flops import encoder_layer_flops


def clip_layers(tower: nn.Module) -> Sequence[Any]:
    """The layers of a CLIP or SigLIP tower, however deep it is wrapped."""
    return next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))


def tower_flops(patches: int, config: PretrainedConfig, special: int = 0) -> float:
    """FLOPs of a vision transformer on one sequence of ``patches`` patches and ``special`` other tokens."""
    embedding = 2 * patches * config.num_channels * config.patch_size**2 * config.hidden_size
    return embedding + config.num_hidden_layers * encoder_layer_flops(patches + special, config)


def pooled_patches(height: int, width: int, side: int) -> Tensor:
    """The patches of every token of a grid of ``height`` x ``width`` patches, ``side`` x ``side`` to a token:
    ``(tokens, patches of a token)``.

    >>> pooled_patches(2, 4, 2)
    tensor([[0, 1, 4, 5],
            [2, 3, 6, 7]])
    """
    patches = torch.arange(height * width).view(height // side, side, width // side, side)
    return patches.transpose(1, 2).reshape(-1, side**2)
