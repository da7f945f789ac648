"""The space that the two towers of a CLIP model share: what likens a vision encoder's states to a question."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from transformers import AutoTokenizer, CLIPModel


@lru_cache(maxsize=1)
def clip_space(checkpoint: str, device: torch.device) -> ClipSpace:
    """The space of one checkpoint; the last one stays loaded."""
    return ClipSpace(checkpoint, device)


class ClipSpace:
    """The text tower and the projections of a CLIP checkpoint, in float32. Its vision tower is not kept."""

    def __init__(self, checkpoint: str, device: torch.device) -> None:
        self.checkpoint = checkpoint
        try:
            with torch.inference_mode(False):
                model: Any = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"clip={checkpoint!r} is no directory of a CLIP model, and no name of one that the hub gives: {error}"
            ) from error
        self._segment = model.config.text_config.max_position_embeddings
        self._text = model.text_model.to(device).eval()
        self._text_projection = model.text_projection.to(device)
        self._norm = model.vision_model.post_layernorm.to(device)
        self._visual_projection = model.visual_projection.to(device)

    @torch.no_grad()
    def question(self, text: str) -> Tensor:
        """Unit vectors ``(segments, dim)``.

        A text that is too long for the text tower is cut as in CDPruner's official code: the begin-of-text token is in
        the first segment alone, and the end-of-text token in the last.
        """
        tokens = self._tokenizer(text, return_tensors="pt", verbose=False).to(self._norm.weight.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        missing = -ids.shape[1] % self._segment
        ids, mask = (pad(each, (0, missing)).reshape(-1, self._segment) for each in (ids, mask))
        pooled = self._text(input_ids=ids, attention_mask=mask).pooler_output
        return normalize(self._text_projection(pooled), dim=-1)

    @torch.no_grad()
    def patches(self, states: Tensor) -> Tensor:
        """Unit vectors ``(n, dim)`` for a vision encoder's states ``(n, width)``."""
        found, width = states.shape[-1], self._visual_projection.in_features
        if found != width:
            raise ValueError(
                f"{self.checkpoint} projects states of width {width}, and this model's vision encoder has {found}: "
                "name the CLIP model that the encoder comes from"
            )
        return normalize(self._visual_projection(self._norm(states.float())), dim=-1)
