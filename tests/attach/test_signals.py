"""Signals: own ones beside the built-in, what the text and CLIP views give, and what cannot be shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import reduce_tokens
from tokenreduce.attach import views
from tokenreduce.models.family import family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import (
    AtDecoder,
    AtEncoder,
    AtProjector,
    Count,
    Geometry,
    Scope,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.registry import MODELS
from tokenreduce.signals import (
    ClassToken,
    ClipSpace,
    DecoderAttention,
    DecoderHidden,
    EncoderAttention,
    EncoderHidden,
    LookAheadAttention,
    PairedText,
    QuestionEmbeddings,
    Signal,
    TextEmbeddings,
    TokenSizes,
    Unseen,
    View,
    Watch,
)
from tokenreduce.testing import check_reducer, prompts, tiny_llava
from tokenreduce.testing.checkpoints import ask, picture, recipes, video
from tokenreduce.testing.clip import SEGMENT

Checkpoint = Callable[[str], Path]
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in recipes()]
WITH_FRAMES = ("llava_next_video", "llava_onevision", "qwen2_5_vl", "video_llava")
LAYERED: dict[type[Step], Any] = {AtEncoder: partial(AtEncoder, layer=1), AtDecoder: partial(AtDecoder, layer=2)}
QUESTIONS = ["what colour is the left square", "how many", "which shape is on the right"]


@dataclass(frozen=True)
class Looks(TokenReducer):
    """Keeps everything and holds on to what it sees."""

    given: tuple[Step, ...]
    seen: list[dict[Signal, Any]] = field(default_factory=list)

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return self.given

    def count(self, step: Step, span: Span) -> Count:
        return span.current if step.keep is None else super().count(step, span)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        self.seen.append({signal: tokens.each(signal) for signal in step.sees})
        return Selection(torch.arange(tokens.keep))


# Signals of one's own.


@dataclass(frozen=True)
class Changes(Signal):
    """How much every frame differs from the one before it, from pixels alone: ``(tiles,)``."""

    joint: ClassVar[bool] = True

    def value(self, view: View) -> Tensor:
        (pixels,) = view.scene.pixels
        frames = pixels.float().reshape(len(view.scene.tiles), -1)
        return torch.cat([torch.full((1,), torch.inf), (frames[1:] - frames[:-1]).abs().mean(-1)])


@dataclass(frozen=True)
class Relevance(Signal):
    """How well each frame fits the question, by anybody's judgement of the two."""

    judge: Callable[[str, Tensor], float]
    joint: ClassVar[bool] = True
    text: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.question()

    def value(self, view: View) -> Tensor:
        scene = view.scene
        frames = scene.pixels[0].reshape(len(scene.tiles), -1)
        return torch.tensor([self.judge(scene.question or "", frame) for frame in frames])


@dataclass(frozen=True)
class Moving(TokenReducer):
    """Drops the frames in which nothing changed."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(scope="picture", sees=(Changes(),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection((tokens[Changes()] > 1e-3)[tokens.tile].nonzero()[:, 0])


@dataclass(frozen=True)
class Asked(TokenReducer):
    """Keeps the frame that fits the question best, and of every other one token."""

    signal: Signal

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(scope="picture", sees=(self.signal,))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        best = int(tokens[self.signal].argmax())
        return Selection(((tokens.tile == best) | (tokens.place == 0)).nonzero()[:, 0])


def judged(question: str, frame: Tensor) -> float:
    """How bright a frame is, or how dark where the question says so."""
    return float(frame.mean()) * (-1 if "dark" in question else 1)


@pytest.fixture(scope="module", params=WITH_FRAMES)
def films(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[tuple[Any, Any, int]]:
    """A model, its processor, and how many frames it takes as one tile."""
    model, processor = load(str(checkpoint(request.param)))
    yield model, processor, 2 if "qwen" in request.param else 1


def test_a_signal_may_read_pixels(films: Any) -> None:
    model, processor, pair = films
    once, other = video(0, 1, 32, 32), video(1, 1, 32, 32)
    film = np.concatenate([frame for frame in (once, once, other, once) for _ in range(pair)])
    batch = ask(processor, [[], []], [[film], [film[: 2 * pair] if pair > 1 else film]])
    with reduce_tokens(model, Moving()) as attachment, torch.no_grad():
        model(**batch)
    changed = [len(image.kept) > 0 for image in attachment.samples[0].images]
    assert changed == [True, False, True, True]
    check_reducer(Moving(), model, batch)


def test_a_signal_may_judge_frames_by_the_question(films: Any) -> None:
    model, processor, pair = films
    film = np.concatenate([np.full((pair, 32, 32, 3), shade, np.uint8) for shade in (90, 200, 10, 120)])
    batch, reducer = ask(processor, [[], []], [[film], [film]]), Asked(Relevance(judged))
    with reduce_tokens(model, reducer, question=["which is bright", "which is dark"]) as attachment, torch.no_grad():
        model(**batch)
    whole = [[len(image.kept) == len(image.grid) for image in sample.images] for sample in attachment.samples]
    assert whole == [[False, True, False, False], [False, False, True, False]]
    check_reducer(reducer, model, batch)
    refused = pytest.raises(ValueError, match="Asked reads the question: pass question= to reduce_tokens")
    with refused, reduce_tokens(model, reducer):
        model(**batch)


@dataclass(frozen=True)
class Position(Signal):
    """Where a tile lies in its prompt: one value for each."""

    def value(self, view: View) -> tuple[int, int]:
        (tile,) = view.scene.tiles
        return tile.picture, len(view.scene.pixels)


@pytest.mark.parametrize("scope", ["tile", "picture", "sample"])
@pytest.mark.parametrize("at", [AtProjector, lambda scope: AtDecoder(layer=2, scope=scope)])
def test_a_signal_is_asked_of_every_tile_at_any_site(checkpoint: Checkpoint, at: Any, scope: Scope) -> None:
    """Inside the language model too."""
    model, processor = load(str(checkpoint("internvl")))
    batch = ask(processor, [[picture(0, 30, 90), picture(1, 50, 50)]])
    shown = family_of(model, MODELS.usable()).pictures(batch)
    step = at(scope=scope)
    reducer = Looks(given=(type(step)(**{**vars(step), "sees": (Position(),)}),))
    with reduce_tokens(model, reducer), torch.no_grad():
        model(**batch)
    tiles = [(place, 1) for place, one in enumerate(shown) for _ in one.tiles]
    pictures = [[tile for tile in tiles if tile[0] == place] for place in range(2)]
    expected = {"tile": [[tile] for tile in tiles], "picture": pictures, "sample": [tiles]}[scope]
    assert [seen[Position()] for seen in reducer.seen] == expected


# Text and CLIP.


@pytest.mark.parametrize("name", FAMILIES)
def test_question_embeddings_are_the_models_own(checkpoint: Checkpoint, name: str) -> None:
    model, processor = load(str(checkpoint(name)), attention=recipes()[name].attention)
    batch = ask(processor, [[picture(0, 40, 40)]] * 3)
    seen = (QuestionEmbeddings(),)
    reducer = Looks(given=(AtProjector(scope="sample", sees=seen), AtDecoder(layer=2, sees=seen)))
    with reduce_tokens(model, reducer, question=QUESTIONS, processor=processor), torch.no_grad():
        model(**batch)
    for number, question in enumerate(QUESTIONS):
        ids = processor.tokenizer(question, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(question.split())
        expected = model.get_input_embeddings()(torch.tensor(ids))
        for step in (reducer.seen[:3], reducer.seen[3:]):
            assert torch.equal(step[number][QuestionEmbeddings()][0], expected)
    with pytest.raises(ValueError, match="pass processor= to reduce_tokens"), reduce_tokens(model, reducer):
        pass


@dataclass(frozen=True)
class LongWords(Signal):
    """The embeddings of the question's words of five letters and more."""

    joint: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.question()
        watch.processor()

    def value(self, view: View) -> Tensor:
        return view.question_embeddings(lambda question: [word for word in question.split() if len(word) > 4])


def test_parts_of_the_question_are_read_one_by_one(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("llava")))
    batch, question = ask(processor, [[picture(0, 40, 40)]] * 2), ["what colour is the square ?", "how many ?"]
    reducer = Looks(given=(AtProjector(scope="sample", sees=(LongWords(),)),))
    with reduce_tokens(model, reducer, question=question, processor=processor), torch.no_grad():
        model(**batch)
    ids = [processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("colour", "square")]
    expected = model.get_input_embeddings()(torch.tensor([*ids[0], *ids[1]]))
    first, second = (seen[LongWords()][0] for seen in reducer.seen)
    assert torch.equal(first, expected)
    assert second.shape == (0, expected.shape[1]), "where nothing of it is read"


@pytest.mark.parametrize("masked", [True, False])
def test_every_picture_has_the_text_behind_it(masked: bool) -> None:
    """A demonstration with a text, one without, and the question; beside it a short prompt with padding at its end."""
    model = tiny_llava()
    model.generation_config.pad_token_id = 0
    image, table = [3] * 36, model.get_input_embeddings()
    texts = [[[7, 8, 9], [], [10, 11]], [[12]]]
    rows = [[1, *(token for text in row for token in [*image, *text])] for row in texts]
    ids = torch.tensor([row + [0] * (len(rows[0]) - len(row)) for row in rows])
    pixels = torch.cat([prompts(model, [1], seed=seed)["pixel_values"] for seed in range(4)])
    given = {"input_ids": ids, "pixel_values": pixels, **({"attention_mask": (ids != 0).long()} if masked else {})}
    reducer = Looks(
        given=(AtProjector(sees=(PairedText(),)), AtDecoder(layer=2, scope="picture", sees=(PairedText(),)))
    )
    with reduce_tokens(model, reducer), torch.no_grad():
        model.generate(**given, max_new_tokens=1)
    expected = [table(torch.tensor(text, dtype=torch.long)) for row in texts for text in row]
    found = [seen[PairedText()][0] for seen in reducer.seen]
    assert len(found) == 8
    assert all(map(torch.equal, found, [*expected, *expected]))
    together = Looks(given=(AtProjector(scope="sample", sees=(Joint(),)),))
    with pytest.raises(ValueError, match="every picture has its own"), reduce_tokens(model, together):
        model(**given)


@dataclass(frozen=True)
class Joint(PairedText):
    """The text of all pictures at once, which there is none of."""

    joint: ClassVar[bool] = True


def test_a_long_question_is_cut_into_segments_or_cut_off(clip: Path) -> None:
    model, question = tiny_llava(), "how many red square are there " * 4
    signals = ClipSpace(str(clip)), ClipSpace(str(clip), truncate=True)
    reducer = Looks(given=(AtProjector(sees=signals),))
    with reduce_tokens(model, reducer, question=question), torch.no_grad():
        model(**prompts(model))
    (seen,) = reducer.seen
    whole, cut = seen[signals[0]][0], seen[signals[1]][0]
    towers: Any = CLIPModel.from_pretrained(clip)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokens = tokenizer(question, return_tensors="pt", truncation=True, max_length=SEGMENT)
    with torch.no_grad():
        text = towers.text_model(**tokens)
        pooled, words = (towers.text_projection(each) for each in (text.pooler_output, text.last_hidden_state))
    torch.testing.assert_close(cut.text, pooled)
    torch.testing.assert_close(cut.segments, words)
    torch.testing.assert_close(cut.text_tokens, words[0])
    length = len(tokenizer(question)["input_ids"])
    assert whole.text.shape[0] == 2 and whole.segments.shape == (2, *words.shape[1:])
    assert len(whole.text_tokens) == length < 2 * SEGMENT, "segments hold padding, and tokens none"
    assert torch.equal(whole.text_tokens, whole.segments.flatten(0, 1)[:length])
    assert {each.dtype for each in vars(whole).values()} == {torch.float32}


def test_clip_space_gives_raw_products(clip: Path) -> None:
    """Of patches, of the whole question and of its tokens, before any normalisation."""
    model, question = tiny_llava(), "what is the colour of the red square ?"
    batch = prompts(model, [1, 2])
    signal = ClipSpace(str(clip))
    reducer = Looks(given=(AtProjector(scope="sample", sees=(signal,)),))
    states: list[Tensor] = []
    family = family_of(model, MODELS.usable())
    layer = family.encoder_layers()[family.geometry.feature_layer]
    hook = layer.register_forward_hook(lambda module, args, output: states.append(output))
    with reduce_tokens(model, reducer, question=question), torch.no_grad():
        model(**batch)
    hook.remove()
    towers: Any = CLIPModel.from_pretrained(clip)
    tokens = AutoTokenizer.from_pretrained(clip)(question, return_tensors="pt")
    with torch.no_grad():
        patches = towers.visual_projection(towers.vision_model.post_layernorm(states[0][:, 1:]))
        text = towers.text_model(**tokens)
        pooled, words = (towers.text_projection(each) for each in (text.pooler_output, text.last_hidden_state[0]))
    spaces = [space for seen in reducer.seen for space in seen[signal]]
    assert len(spaces) == 3
    for space, expected in zip(spaces, patches, strict=True):
        torch.testing.assert_close(space.patches, expected)
        torch.testing.assert_close(space.text, pooled)
        torch.testing.assert_close(space.text_tokens, words)
        assert {each.dtype for each in vars(space).values()} == {torch.float32}


# Inside the language model.


@pytest.mark.parametrize("name", FAMILIES)
def test_the_look_ahead_without_rotation(checkpoint: Checkpoint, name: str) -> None:
    """Queries and keys are the plain projections of the states, normed where the model norms them."""
    model, processor = load(str(checkpoint(name)), attention=recipes()[name].attention)
    batch = ask(processor, [[picture(0, 60, 40)], [picture(1, 30, 90), picture(2, 50, 50)]])
    family, signal, states = family_of(model, MODELS.usable()), LookAheadAttention(rotated=False), list[Tensor]()
    layer: Any = family.stack.layers[2]
    reducer = Looks(given=(AtDecoder(layer=2, sees=(signal,)),))
    with reduce_tokens(model, reducer) as attachment, torch.no_grad():
        hook = layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        model(**batch)
        hook.remove()
    visual = attachment.visual(batch["input_ids"])
    for row, seen in enumerate(reducer.seen):
        (view,), valid = seen[signal], batch["attention_mask"][row].bool()
        with torch.no_grad():
            normed = layer.input_layernorm(states[0][row, valid])
        queries, keys = (projected(layer.self_attn, kind, normed) for kind in ("q", "k"))
        torch.testing.assert_close(view.queries, queries)
        torch.testing.assert_close(view.keys, keys)
        places = visual[row, valid].nonzero()[:, 0]
        assert view.visual.tolist() == places.tolist()
        assert view.text.tolist() == list(range(int(places.max()) + 1, int(valid.sum())))
        assert view.scale == layer.self_attn.scaling


@torch.no_grad()
def projected(attention: Any, kind: str, states: Tensor) -> Tensor:
    """The queries or keys ``(heads, n, head_dim)`` of states ``(n, dim)`` by hand."""
    heads = getattr(attention, f"{kind}_proj")(states).unflatten(-1, (-1, attention.head_dim))
    norm: nn.Module = getattr(attention, f"{kind}_norm", nn.Identity())
    return norm(heads).transpose(0, 1)


@dataclass(frozen=True)
class Shuffled(TokenReducer):
    """Puts all tokens of a picture into an order of its own, and looks on tile by tile inside the language model."""

    seen: list[Any] = field(default_factory=list)

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        look = AtDecoder(layer=2, keep=1.0, scope="tile", sees=(LookAheadAttention(), TextEmbeddings()))
        return [AtProjector(keep=1.0, scope="picture", ordered=True), look]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if not step.sees:
            return Selection(torch.randperm(len(tokens), generator=tokens.generator(0)))
        self.seen.append((tokens[LookAheadAttention()].text.tolist(), len(tokens[TextEmbeddings()])))
        return tokens.everything()


def test_every_selection_of_a_cut_sees_the_same_text(checkpoint: Checkpoint) -> None:
    """The tokens behind the last visual one, also where that is of a tile that was chosen from already."""
    model, processor = load(str(checkpoint("internvl")))
    reducer = Shuffled()
    with reduce_tokens(model, reducer), torch.no_grad():
        model(**ask(processor, [[picture(0, 30, 90)]]))
    assert len(reducer.seen) > 2
    assert all(seen == reducer.seen[0] for seen in reducer.seen)
    assert len(reducer.seen[0][0]) == reducer.seen[0][1] > 0


@dataclass(frozen=True)
class Few(TokenReducer):
    """Drops in layer 1, and looks back in layer 2."""

    back: int = 0

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtDecoder(layer=1, keep=0.5), AtDecoder(layer=2, keep=0.5, sees=(DecoderAttention(self.back),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        scores = tokens.features.float().sum(-1)
        for signal in step.sees:
            scores = tokens[signal].mean(-1)[0]
        return Selection(tokens.best(scores))


def test_a_layer_before_an_earlier_cut_is_never_shown(llava: Model) -> None:
    """Not even where the longest prompt of a batch lost nothing, so that all are as wide as before."""
    single = prompts(llava, [1])
    lead, text = 80 - single["input_ids"].shape[1], torch.randint(10, 100, (1, 80))
    wide = {
        "input_ids": torch.cat([nn.functional.pad(single["input_ids"], (lead, 0)), text]),
        "attention_mask": torch.cat([nn.functional.pad(single["attention_mask"], (lead, 0)), torch.ones_like(text)]),
        "pixel_values": single["pixel_values"],
    }
    gone = "that layer ran before an earlier cut"
    for inputs in (single, wide):
        with pytest.raises(ValueError, match=gone), reduce_tokens(llava, Few()), torch.no_grad():
            llava(**inputs)
        check_reducer(Few(back=1), llava, inputs)


# What cannot be shown.


@dataclass(frozen=True)
class Together(Signal):
    """A signal about a whole scope that asks for what tiles have one by one."""

    joint: ClassVar[bool] = True

    def watch(self, watch: Watch) -> None:
        watch.encoder_hidden(0)

    def value(self, view: View) -> Tensor:
        return view.encoder_hidden(0)


@dataclass(frozen=True)
class Choosy(Signal):
    """A signal that knows itself what it cannot work with."""

    def watch(self, watch: Watch) -> None:
        raise Unseen("it was never trained for so few layers")

    def value(self, view: View) -> None:
        return None


@pytest.mark.parametrize(
    ("steps", "signal", "site", "reason"),
    [
        ([AtProjector], DecoderHidden(), "AtProjector", "the language model has not run yet"),
        ([AtProjector], LookAheadAttention(rotated=False), "AtProjector", "the language model has not run yet"),
        ([AtProjector], QuestionEmbeddings(), "AtProjector", "the model's processor is not known"),
        ([AtProjector], EncoderAttention(9), "AtProjector", "layer=9 does not exist in a stack of 4"),
        ([AtProjector], Choosy(), "AtProjector", "it was never trained for so few layers"),
        ([AtProjector], Together(), "AtProjector", "every tile has its own"),
        ([AtDecoder], EncoderAttention(), "AtDecoder", "the vision encoder has run by then"),
        ([AtDecoder], TokenSizes(), "AtDecoder", "the vision encoder has run by then"),
        (
            [AtDecoder],
            DecoderAttention(2),
            "AtDecoder",
            "that layer has not run yet; LookAheadAttention is what layer 2",
        ),
        ([AtEncoder], EncoderHidden(2), "AtEncoder", "that layer has not run yet"),
        ([AtEncoder], EncoderAttention(2), "AtEncoder", "that layer has not run yet, or not through"),
        ([AtEncoder, AtProjector], EncoderAttention(0), "AtProjector", "ran before an earlier step in the encoder"),
        ([AtEncoder, AtProjector], EncoderHidden(0), "AtProjector", "ran before an earlier step in the encoder"),
        ([AtProjector], ClassToken(), "AtProjector", "its vision encoder has no class token"),
    ],
    ids=str,
)
def test_a_refusal_names_the_signal_the_site_and_the_family(
    steps: Sequence[type[Step]], signal: Signal, site: str, reason: str
) -> None:
    model = tiny_llava(tower="siglip" if isinstance(signal, ClassToken) else "clip")
    *before, last = steps
    made: list[Any] = [LAYERED.get(kind, kind)(keep=0.5) for kind in before]
    made.append(LAYERED.get(last, last)(keep=0.5, sees=(signal,)))
    with pytest.raises(ValueError) as refused, torch.no_grad(), reduce_tokens(model, Looks(given=tuple(made))):
        model(**prompts(model, [1]))
    said = str(refused.value)
    assert said.startswith(f"Looks asks to see {signal} {site}, which Llava models cannot show: "), said
    assert reason in said


def test_a_windowed_layer_that_is_stood_in_for_is_said_once(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("qwen2_5_vl")))
    family, batch = family_of(model, MODELS.usable()), ask(processor, [[picture(0, 60, 40)]])
    assert [family.attention_layer(layer) for layer in range(4)] == [1, 1, 3, 3]
    views._say.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layers in ((2, 3), (2,), (0, 2)):
            reducer = Looks(given=(AtProjector(sees=tuple(EncoderAttention(layer) for layer in layers)),))
            with reduce_tokens(model, reducer), torch.no_grad():
                model(**batch)
    said = [str(warning.message) for warning in caught if "stands in" in str(warning.message)]
    assert said == [
        f"the attention of encoder layer {asked} of Qwen2_5VL models does not reach over a whole tile: that of layer "
        f"{shown} stands in for it"
        for asked, shown in ((2, 3), (0, 1))
    ]
