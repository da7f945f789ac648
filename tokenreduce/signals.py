"""What a reducer may ask to see, and the views that it is handed.

A signal is a small frozen dataclass that a step lists in ``sees``; ``tokens[signal]`` gives its value. It computes
itself, from a :class:`View` of what the site can show, and says beforehand what of the model must be watched for that;
so a signal of another package is one class like those here. Nothing is computed before it is asked for, and no full
attention map is ever held for all heads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import Geometry, Layer, Tile, blocks

Rows = int | slice | Tensor
"""Places in a sequence: one index, a slice, or a long tensor of indices."""


class Unseen(ValueError):
    """A site, or a family of models, cannot show what a signal asks for; the message says why."""


class Watch(Protocol):
    """What a signal can have watched, before anything runs. Raises :class:`Unseen` for what the site cannot show."""

    geometry: Geometry

    def encoder_attention(self, layer: Layer) -> None:
        """A layer of the vision encoder computes its attention."""

    def encoder_hidden(self, layer: Layer) -> None:
        """A layer of the vision encoder gives its hidden states."""

    def class_token(self) -> None:
        """The vision encoder has a class token."""

    def token_sizes(self) -> None:
        """How many tokens were merged into each is known."""

    def decoder_attention(self, layer: Layer) -> None:
        """A layer of the language model computes its attention."""

    def decoder(self) -> None:
        """The states inside the language model are at hand."""

    def question(self) -> None:
        """The question is known."""

    def processor(self) -> None:
        """The model's processor is known."""


@dataclass(frozen=True)
class Scene:
    """What a selection is about, for signals of one's own.

    family:    the model's :class:`~tokenreduce.models.family.ModelFamily`.
    inputs:    the call's inputs, as the processor made them.
    tiles:     the tiles that the value is about: one, unless the signal is ``joint``.
    pixels:    of each of their pictures the pixels, as the model takes them.
    question:  what the prompt asks, None where nobody said.
    processor: the model's, None where nobody gave it.
    """

    family: Any
    inputs: Mapping[str, Any]
    tiles: tuple[Tile, ...]
    pixels: tuple[Tensor, ...]
    question: str | None
    processor: Any


class View(Protocol):
    """What a site shows of the model's present state. What it cannot show raises :class:`Unseen`."""

    @property
    def scene(self) -> Scene:
        """What the value is about."""

    @property
    def geometry(self) -> Geometry:
        """The model's."""

    def encoder_attention(self, layer: Layer) -> Attention:
        """A tile's view on the attention of a layer of the vision encoder."""

    def encoder_hidden(self, layer: Layer) -> Tensor:
        """The states of a tile's tokens behind a layer of the vision encoder: ``(tokens, dim)``."""

    def class_token(self) -> Tensor:
        """The class token's feature in the layer that the projector takes: ``(dim,)``."""

    def token_sizes(self) -> Tensor:
        """How many tokens were merged into each: ``(tokens,)``."""

    def decoder_attention(self, layer: Layer) -> Attention:
        """A view on the attention of a layer of the language model."""

    def look_ahead(self, rotated: bool) -> Attention:
        """The attention that the next layer would compute."""

    def decoder_hidden(self, normed: bool) -> Tensor:
        """The states of a sample's whole sequence: ``(sequence, dim)``."""

    def entered(self) -> tuple[Tensor, Tensor]:
        """Visual tokens ``(entered, dim)`` and the text behind them ``(text, dim)``, as they entered."""

    def question_embeddings(self, parts: Callable[[str], Sequence[str]] = lambda question: (question,)) -> Tensor:
        """The input embeddings of the question's tokens: ``(tokens, dim)``. ``parts`` says what of the question is
        read: texts whose tokens are made one text after the other; by default all of it at once."""

    def paired_text(self) -> Tensor:
        """The input embeddings of the text behind a picture, up to the next one: ``(tokens, dim)``."""

    def clip(self, checkpoint: str, truncate: bool = False) -> Clip:
        """A tile's states and the question in the space of a CLIP model; ``truncate`` as of :class:`ClipSpace`."""


@dataclass(frozen=True)
class Signal(ABC):
    """Something that a reducer may ask to see.

    joint: True if its value is about the whole scope of a step, False if every tile of the scope has one.
    text:  True if it depends on what is asked.
    """

    joint: ClassVar[bool] = False
    text: ClassVar[bool] = False

    def watch(self, watch: Watch) -> None:  # noqa: B027  # most signals of one's own need nothing watched
        """Say what of the model must be watched. Raises :class:`Unseen` for what the site cannot show."""

    @abstractmethod
    def value(self, view: View) -> Any:
        """The signal's value. Called when it is asked for, once a tile unless the signal is ``joint``."""


@dataclass(frozen=True)
class EncoderAttention(Signal):
    """Self-attention of one layer of the vision encoder, as an :class:`Attention`. ``-2`` is LLaVA's feature layer."""

    layer: Layer = -2

    def watch(self, watch: Watch) -> None:
        watch.encoder_attention(self.layer)

    def value(self, view: View) -> Attention:
        return view.encoder_attention(self.layer)


@dataclass(frozen=True)
class EncoderHidden(Signal):
    """The patches' hidden states after one layer of the vision encoder: ``(tokens, dim)``; the mean over a token's
    patches where it has several."""

    layer: Layer = -2

    def watch(self, watch: Watch) -> None:
        watch.encoder_hidden(self.layer)

    def value(self, view: View) -> Tensor:
        return view.encoder_hidden(self.layer)


@dataclass(frozen=True)
class ClassToken(Signal):
    """The class token's feature in the layer that the projector takes its features from: ``(dim,)``."""

    def watch(self, watch: Watch) -> None:
        watch.class_token()
        watch.encoder_hidden(watch.geometry.feature_layer)

    def value(self, view: View) -> Tensor:
        return view.class_token()


@dataclass(frozen=True)
class TokenSizes(Signal):
    """How many tokens were merged into each token so far: ``(tokens,)``, ones at first."""

    def watch(self, watch: Watch) -> None:
        watch.token_sizes()

    def value(self, view: View) -> Tensor:
        return view.token_sizes()


@dataclass(frozen=True)
class ClipSpace(Signal):
    """A tile's patches and the question in the space that the two towers of a CLIP model share, as a :class:`Clip`.

    clip:     the CLIP model that the vision encoder comes from: a directory, or a name on the hub. It is loaded when
              first asked for.
    truncate: True if a question that is too long for the text tower loses its end, as CLIP's own tokenizer has it;
              otherwise it is cut into segments.
    """

    clip: str
    truncate: bool = False
    text: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.question()
        watch.encoder_hidden(watch.geometry.feature_layer)

    def value(self, view: View) -> Any:
        return view.clip(self.clip, self.truncate)


@dataclass(frozen=True)
class QuestionLikeness(ClipSpace):
    """Cosines of every visual token with every segment of the question that is asked about the picture, in the space
    that the two towers of a CLIP model share: ``(tokens, segments)``, float32. A segment is what the text tower takes
    at once; most questions are one."""

    def value(self, view: View) -> Tensor:
        space = view.clip(self.clip, self.truncate)
        return normalize(space.patches, dim=-1) @ normalize(space.text, dim=-1).T


@dataclass(frozen=True)
class QuestionEmbeddings(Signal):
    """The question's tokens in the language model's own embedding table: ``(tokens, dim)``. The processor's tokenizer
    makes them, so ``reduce_tokens(..., processor=, question=)`` takes both."""

    joint: ClassVar[bool] = True
    text: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.question()
        watch.processor()

    def value(self, view: View) -> Tensor:
        return view.question_embeddings()


@dataclass(frozen=True)
class PairedText(Signal):
    """The text that stands behind a tile's picture in the prompt, up to the next picture, in the language model's own
    embedding table: ``(tokens, dim)``. Where demonstrations are interleaved with pictures, each is its picture's."""

    text: ClassVar[bool] = True

    def value(self, view: View) -> Tensor:
        return view.paired_text()


@dataclass(frozen=True)
class DecoderAttention(Signal):
    """Self-attention of one layer of the language model in prefill, as an :class:`Attention`."""

    layer: Layer
    joint: ClassVar[bool] = True
    text: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.decoder_attention(self.layer)

    def value(self, view: View) -> Attention:
        return view.decoder_attention(self.layer)


@dataclass(frozen=True)
class LookAheadAttention(Signal):
    """The attention that the decoder layer at whose input the step stands would pay to the states as they are now.

    rotated: False for queries and keys without their rotary embedding.
    """

    rotated: bool = True
    joint: ClassVar[bool] = True
    text: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.decoder()

    def value(self, view: View) -> Attention:
        return view.look_ahead(self.rotated)


@dataclass(frozen=True)
class DecoderHidden(Signal):
    """A sample's whole sequence at the step's decoder layer: ``(sequence, dim)``; ``normed`` by the final norm."""

    normed: bool = False
    joint: ClassVar[bool] = True
    text: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.decoder()

    def value(self, view: View) -> Tensor:
        return view.decoder_hidden(self.normed)


@dataclass(frozen=True)
class ProjectedFeatures(Signal):
    """A sample's visual tokens as they entered the language model: ``(entered, dim)``."""

    joint: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.decoder()

    def value(self, view: View) -> Tensor:
        return view.entered()[0]


@dataclass(frozen=True)
class TextEmbeddings(Signal):
    """The input embeddings of the tokens behind a sample's last visual token: ``(text, dim)``."""

    joint: ClassVar[bool] = True
    text: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.decoder()

    def value(self, view: View) -> Tensor:
        return view.entered()[1]


@dataclass(frozen=True)
class Clip:
    """A tile and the question in the space of a CLIP model, in float32 and before any normalisation.

    patches:     ``(tokens, dim)``, the visual tokens' projected states.
    text:        ``(segments, dim)``, the pooled and projected question; a segment is what the text tower takes at once.
    text_tokens: ``(text tokens, dim)``, the question's tokens, projected one by one.
    segments:    ``(segments, length, dim)``, likewise all places of the segments, those of padding too; of none unless
                 a site gives them.
    """

    patches: Tensor
    text: Tensor
    text_tokens: Tensor
    segments: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))


@dataclass(frozen=True)
class Attention:
    """A view on one attention layer for one sequence; probabilities are computed for the rows that are asked for, in
    float32.

    queries: ``(heads, queries, head_dim)``
    keys:    ``(key_heads, keys, head_dim)``; fewer heads than queries under grouped-query attention
    values:  ``(key_heads, keys, head_dim)``
    scale:   what the dot products are multiplied by
    mask:    ``(queries, keys)``, added to the scaled dot products when floating point, allowed places when bool; or
    None
    visual:  where the visual tokens stand in the sequence of keys (a class token or text may stand before them);
             ``(tokens, group)`` where a visual token is made of several patches
    class_token: the class token's place, or None where the encoder has none
    causal:  whether a query sees only the keys up to its own place
    text:    where the text behind the last visual token stands, or None in a vision encoder
    softcap: the bound that a tanh puts on the scores before the mask, or None
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    visual: Rows
    class_token: int | None = None
    mask: Tensor | None = None
    causal: bool = False
    text: Tensor | None = None
    softcap: float | None = None

    def scores(self, queries: Rows) -> Tensor:
        """Scaled and masked dot products before the softmax: ``(heads, rows, keys)``."""
        return torch.cat([self._scores(head, queries) for head in range(self.queries.shape[0])])

    def rows(self, queries: Rows) -> Tensor:
        """Attention probabilities of some queries over the whole sequence: ``(heads, rows, keys)``."""
        return self.scores(queries).softmax(-1)

    def mean(self, queries: Rows | None = None, keys: Rows | None = None) -> Tensor:
        """Attention probabilities averaged over heads: ``(queries, keys)``, by default among the visual tokens.

        The softmax always runs over the whole sequence; heads are added one after the other. Of a group of patches the
        mean counts, as queries and as keys.
        """
        rows = _many(self.visual if queries is None else queries)
        columns = _many(self.visual if keys is None else keys)
        grouped = isinstance(rows, Tensor) and rows.ndim == 2
        each = rows.flatten() if grouped else rows  # type: ignore[union-attr]
        total = self._scores(0, each)[0].softmax(-1)
        for head in range(1, self.queries.shape[0]):
            total += self._scores(head, each)[0].softmax(-1)
        mean = (total / self.queries.shape[0])[:, columns]
        mean = mean.mean(-1) if mean.ndim == 3 else mean
        return mean.unflatten(0, rows.shape).mean(1) if grouped else mean  # type: ignore[union-attr]

    def received(self, queries: Rows | None = None) -> Tensor:
        """What the visual tokens receive from some queries, averaged over these and over heads: ``(tokens,)``. By
        default the query is the class token, or without one they are the whole sequence."""
        if queries is None:
            queries = slice(None) if self.class_token is None else self.class_token
        return self.marginals(queries)[0]

    def marginals(self, queries: Rows | None = None) -> tuple[Tensor, Tensor]:
        """What the visual tokens receive from some queries ``(tokens,)``, and what each of these gives them
        ``(queries,)``: the column and row means of :meth:`mean`, by default among the visual tokens.

        Sums run over blocks of queries, so memory is linear in the sequence.
        """
        places = torch.arange(self.queries.shape[1], device=self.queries.device)
        places = places[_many(self.visual if queries is None else queries)]
        group = places[0].numel() if len(places) else 1
        received, given = self.queries.new_zeros((), dtype=torch.float32), []
        for block in blocks(places, group * self.keys.shape[1]):
            weights = self.mean(block)
            received = received + weights.sum(dim=0)
            given.append(weights.mean(dim=1))
        return received / len(places), torch.cat(given)

    def _scores(self, head: int, queries: Rows) -> Tensor:
        """One head's logits in float32: ``(1, rows, keys)``."""
        queries = _many(queries)
        groups = self.queries.shape[0] // self.keys.shape[0]
        logits = (self.queries[head][queries].float() * self.scale) @ self.keys[head // groups].float().T
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        if self.mask is not None:
            rows = self.mask[queries]
            logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows
        if self.causal:
            places = torch.arange(self.keys.shape[1], device=logits.device)
            logits = logits.masked_fill(places > places[queries][:, None], -torch.inf)
        return logits[None]


def _many(rows: Rows) -> slice | Tensor:
    """One place as a stretch of one, so that no dimension is lost."""
    return slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
