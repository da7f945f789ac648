"""MMTok (arXiv 2508.18264): the tokens that together cover both the words of the question and the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, normalize

from tokenreduce.reducer import AtProjector, Geometry, Keep, Layer, Selection, Step, TokenReducer, VisualTokens, cover
from tokenreduce.signals import EncoderHidden, QuestionEmbeddings, Signal, View

INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""What LLaVA's prompts add to a question, and the official code takes out again."""

UNSEEN = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was were be been being have has had do does did it they he she we you i what where when why "
        "how who which and or but so if then question answer to for with by from at into onto upon",
    )
)
"""Words that no picture shows, by the official code."""


@dataclass(frozen=True)
class QuestionWords(QuestionEmbeddings):
    """The question's words in the language model's embedding table, each tokenised alone: ``(tokens, dim)``.

    clean_text: True for those that a picture can show, or all of them if there are none; False for all of them, and
                "Question:" before.
    """

    clean_text: bool

    def value(self, view: View) -> Tensor:
        return view.question_embeddings(
            cleaned if self.clean_text else lambda question: ["Question:", *question.split()]
        )


@dataclass(frozen=True)
class SquarePadding(Signal):
    """Which places of a tile's grid lie wholly in padding, ``(places,)`` bool: in rows or columns of the mean colour,
    0 once normalised, by which a LLaVA processor makes a picture a square. Of a picture that is cut up none do."""

    def value(self, view: View) -> Tensor:
        (tile,), (pixels,) = view.scene.tiles, view.scene.pixels
        grid = tile.grid
        if pixels.ndim != 3:
            return torch.zeros(len(grid), dtype=torch.bool, device=pixels.device)
        most = adaptive_max_pool2d(pixels.float().abs().amax(0, keepdim=True), (grid.height, grid.width))[0]
        plain = most < 0.016  # a grey level; the mean colour is rounded down to one
        return (plain.all(1, keepdim=True) | plain.all(0, keepdim=True)).flatten()


@dataclass(frozen=True)
class MmTok(TokenReducer):
    """Keep the tokens that together cover the words of the question, and all tokens of the picture, best.

    How well a token covers a word, or another token, is its share of a softmax of cosines over all tokens: of the
    projected tokens with words, of the encoder's states with one another.

    alpha:      the weight of the picture against that of the question, 1.
    tv_temp:    the temperature of the softmax of words, 0.02 for LLaVA, 0.01 for Qwen.
    vv_temp:    that of tokens.
    layer:      the encoder layer whose states are compared, -2 for LLaVA, -1 for Qwen.
    clean_text: True to leave out words that no picture shows, as for LLaVA; False for Qwen.

    What lies in the padding of a picture that was made a square is covered but not kept, while there is anything else;
    the official code does so for LLaVA-1.5 alone, and knows the padding by the picture's size. On models that cut up
    pictures, ``keep`` is of every tile, as published. Presets: mmtok_64, mmtok_128 and mmtok_192 for LLaVA-1.5;
    mmtok_qwen_r05, mmtok_qwen_r10 and mmtok_qwen_r20, where survivors keep their positions.
    """

    paper = "2508.18264"
    parity = "official vectors, 4 cases"

    keep: Keep = 1 / 9
    alpha: float = 0.5
    tv_temp: float = 0.02
    vv_temp: float = 0.2
    layer: Layer = -2
    clean_text: bool = True

    def steps(self, geometry: Geometry) -> list[Step]:
        sees = (EncoderHidden(self.layer), QuestionWords(self.clean_text), SquarePadding())
        return [AtProjector(keep=self.keep, sees=sees)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        states, words, padding = (tokens[signal] for signal in step.sees)
        rows = self.coverage(tokens.features, states, words)
        last = -(2 + self.alpha) * padding[tokens.place].float()  # all rows together add 1 + alpha at most
        return Selection(cover(rows, tokens.keep, gains=last).sort().values)

    @torch.no_grad()
    def coverage(self, features: Tensor, states: Tensor, words: Tensor) -> Tensor:
        """How well every token covers every word, and then every token: ``(words + n, n)``."""
        visual, encoded, text = (unit(each) for each in (features, states, words))
        rows = visual.new_empty(len(text) + len(visual), len(visual))
        rows[: len(text)] = (text @ visual.T / self.tv_temp).softmax(dim=-1) / max(1, len(text))
        for part, row in zip(rows[len(text) :].split(512), encoded.split(512), strict=True):
            part.copy_((row @ encoded.T / self.vv_temp).softmax(dim=-1) * (self.alpha / len(visual)))
        return rows


def cleaned(question: str) -> Sequence[str]:
    """The words of a question that a picture can show; all of it where there are none."""
    for instruction in INSTRUCTIONS:
        question = question.replace(instruction, "")
    return [word for word in re.findall(r"\b\w+\b", question) if word.lower() not in UNSEEN] or question.split()


def titled(question: str) -> Sequence[str]:
    """All words of a question, and before them what it is."""
    return ["Question:", *question.split()]


def unit(rows: Tensor) -> Tensor:
    return normalize(rows, dim=-1, eps=1e-8).float()
