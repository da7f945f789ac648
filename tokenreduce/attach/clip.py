"""The space that the two towers of a CLIP model share: what likens a vision encoder's states to a question."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer, CLIPModel


@lru_cache(maxsize=1)
def clip_space(checkpoint: str, device: torch.device) -> ClipSpace:
    """The space of one checkpoint; the last one stays loaded."""
    return ClipSpace(checkpoint, device)


class Question(NamedTuple):
    """A text in the space of a CLIP model, in float32.

    pooled:   ``(segments, dim)``, each segment as a whole.
    tokens:   ``(tokens, dim)``, its tokens, projected one by one, without padding.
    segments: ``(segments, length, dim)``, likewise all places of the segments, padding included.
    """

    pooled: Tensor
    tokens: Tensor
    segments: Tensor


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
        self._read: dict[tuple[str, bool], Question] = {}
        self._text_projection = model.text_projection.to(device)
        self._norm = model.vision_model.post_layernorm.to(device)
        self._visual_projection = model.visual_projection.to(device)

    @torch.no_grad()
    def read(self, text: str, truncate: bool = False) -> Question:
        """A text, read by the text tower.

        One that is too long for it loses its end where ``truncate`` is True. Otherwise it is cut as in CDPruner's
        official code: the begin-of-text token is in the first segment alone, and the end-of-text token in the last.
        """
        if (text, truncate) not in self._read:
            length = {"truncation": True, "max_length": self._segment} if truncate else {}
            tokens = self._tokenizer(text, return_tensors="pt", verbose=False, **length)
            ids, mask = (tokens[name].to(self._norm.weight.device) for name in ("input_ids", "attention_mask"))
            missing = -ids.shape[1] % self._segment
            ids, mask = (pad(each, (0, missing)).reshape(-1, self._segment) for each in (ids, mask))
            output = self._tower(input_ids=ids, attention_mask=mask)
            segments = self._text_projection(output.last_hidden_state)
            self._read.clear()  # every tile of a picture asks for the same text
            pooled = self._text_projection(output.pooler_output)
            self._read[text, truncate] = Question(pooled, segments[mask.bool()], segments)
        return self._read[text, truncate]

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
