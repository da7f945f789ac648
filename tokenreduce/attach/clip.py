"""The space that the two towers of a CLIP model share: what likens a vision encoder's states to a question."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
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
        self._tower = model.text_model.to(device).eval()
        self._read: dict[str, tuple[Tensor, Tensor]] = {}
        self._text_projection = model.text_projection.to(device)
        self._norm = model.vision_model.post_layernorm.to(device)
        self._visual_projection = model.visual_projection.to(device)

    def question(self, text: str) -> Tensor:
        """The pooled and projected text ``(segments, dim)``.

        A text that is too long for the text tower is cut as in CDPruner's official code: the begin-of-text token is in
        the first segment alone, and the end-of-text token in the last.
        """
        return self._text(text)[0]

    def words(self, text: str) -> Tensor:
        """The text's tokens, projected one by one, without padding: ``(tokens, dim)``."""
        return self._text(text)[1]

    @torch.no_grad()
    def patches(self, states: Tensor) -> Tensor:
        """The projections ``(n, dim)`` of a vision encoder's states ``(n, width)``."""
        found, width = states.shape[-1], self._visual_projection.in_features
        if found != width:
            raise ValueError(
                f"{self.checkpoint} projects states of width {width}, and this model's vision encoder has {found}: "
                "name the CLIP model that the encoder comes from"
            )
        return self._visual_projection(self._norm(states.float()))

    @torch.no_grad()
    def _text(self, text: str) -> tuple[Tensor, Tensor]:
        if text not in self._read:
            tokens = self._tokenizer(text, return_tensors="pt", verbose=False).to(self._norm.weight.device)
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            missing = -ids.shape[1] % self._segment
            ids, mask = (pad(each, (0, missing)).reshape(-1, self._segment) for each in (ids, mask))
            output = self._tower(input_ids=ids, attention_mask=mask)
            words = output.last_hidden_state[mask.bool()]
            self._read.clear()  # every tile of a picture asks for the same text
            self._read[text] = self._text_projection(output.pooler_output), self._text_projection(words)
        return self._read[text]
