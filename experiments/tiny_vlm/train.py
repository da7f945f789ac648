"""Train the embedded model: a LLaVA of two million parameters that answers questions about generated scenes.

    python experiments/tiny_vlm/train.py --output outputs/tiny_vlm

Five phases; the first two know nothing of each other and run side by side, one process each:

tower     the vision tower learns to say of every patch what it shows (colour, name, centre of a thing), from crowded
          scenes;
language  the language model learns to answer from oracle visual tokens, sums of word embeddings made from the scene
          itself;
align     the projector learns to turn the tower's patches into those oracle tokens, everything else frozen;
look      the tower's layer -2 learns that patches look at things rather than at the background, as far as the features
          that it gives allow: they are held where they are;
last      the tower's last layer, which LLaVA does not read, learns the scene's summary on CLS, everything else frozen.

Every answer is learnt as it will be asked: the questions of a scene are packed behind one image, under a mask that lets
each see the image and itself only. The script saves its state as it goes; started again, it goes on from there. The
checkpoint is written to the folder `model` of the output folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import LlamaAttention

from tokenreduce.benchmarks.scenes import (
    CATEGORIES,
    COLORS,
    PLACES,
    SHAPES,
    SIZE,
    Scene,
    ask,
    ask_count,
    make_scene,
    paint,
    place_digit,
    place_thing,
)

PATCH = 8
SIDE = SIZE // PATCH
PATCHES = SIDE * SIDE
WIDTH = 128
COLOR_NAMES = list(COLORS)
THING_NAMES = [*SHAPES, *map(str, range(10))]
PAIRS = [(shape, color) for shape in SHAPES for color in COLORS]
TURN = 8
"""Longest turn, in tokens: six of a question, the start of the answer, the answer."""
TURNS = {"existence": 3, "attribute": 2, "counting": 3, "position": 2, "reading": 2}
"""Turns of each category behind one image."""
NO_LABEL = -100
BATCH = {"tower": 32, "language": 16, "align": 32, "look": 32, "last": 32}
"""Images a step of each phase."""
STEPS = {"tower": 800, "language": 1200, "align": 300, "look": 150, "last": 100}
"""Steps of each phase."""
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<assistant>"]
WORDS = [
    *COLORS,
    *SHAPES,
    *SHAPES.values(),
    *map(str, range(10)),
    *PLACES,
    *[
        "yes",
        "no",
        "is",
        "there",
        "a",
        "what",
        "color",
        "the",
        "how",
        "many",
        "are",
        "where",
        "which",
        "digit",
        "?",
        ".",
    ],
]
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer, image processor and chat template."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[a-z]+-[a-z]+|\w+|[^\w\s]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    core.decoder = decoders.Sequence([])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        padding_side="left",
        model_max_length=512,
    )
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(vocabulary: dict[str, int]) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"],
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    words = model.get_input_embeddings().weight
    nn.init.normal_(words, std=0.08)
    with torch.no_grad():  # "circles" asks for what "circle" names
        for singular, plural in SHAPES.items():
            words[vocabulary[plural]] = words[vocabulary[singular]]
    for layer in model.model.language_model.layers:
        start_as_lookup(layer.self_attn)
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"],
        do_sample=False,
        max_new_tokens=8,
    )
    return model


@torch.no_grad()
def start_as_lookup(attention: LlamaAttention) -> None:
    """Initialise attention to find tokens like the one that asks and to copy them.

    Equal query and key weights, and output weights that undo the value weights, spare training the long plateau before
    a question finds its object (Trockman and Kolter, 2023, "Mimetic initialization of self-attention layers").
    """
    nn.init.normal_(attention.q_proj.weight, std=WIDTH**-0.5)
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    nn.init.normal_(attention.v_proj.weight, std=WIDTH**-0.5)
    attention.o_proj.weight.copy_(0.3 * attention.v_proj.weight.T)


class Student(nn.Module):
    """The model and what is only there to train it: heads on the tower and the oracle's own vectors."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.llava = build_model(vocabulary)
        self.tower = self.llava.model.vision_tower
        self.projector = self.llava.model.multi_modal_projector
        self.language = self.llava.model.language_model
        self.patch_head = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(COLOR_NAMES) + len(THING_NAMES) + len(PLACES) + 3)
        )
        self.summary_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, Batch.SUMMARY))
        self.last_head = nn.Linear(WIDTH, Batch.SUMMARY)
        # What an oracle token says besides words: that a patch shows nothing, and that it holds the centre of a thing.
        self.nothing = nn.Parameter(torch.randn(WIDTH) * 0.08)
        self.center = nn.Parameter(torch.randn(WIDTH) * 0.08)
        for name, words in (("color", COLOR_NAMES), ("name", THING_NAMES), ("place", PLACES)):
            self.register_buffer(f"{name}_words", torch.tensor([vocabulary[w] for w in words]), persistent=False)
        self.register_buffer("places", torch.from_numpy(patch_places()), persistent=False)

    def see(self, pixels: Tensor, layers: int = 4) -> Tensor:
        """Hidden states of the tower after its first layers, CLS first: after four, the ones that LLaVA selects."""
        states = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower.encoder.layers[:layers]:
            states = layer(states, None)
        return states

    def oracle(self, batch: Batch) -> Tensor:
        """Visual tokens `(scenes, patches, width)` made of the scenes' own truth."""
        words = self.language.embed_tokens.weight
        thing = words[self.color_words][batch.color.clamp(max=len(COLOR_NAMES) - 1)]
        thing = thing + words[self.name_words][batch.name.clamp(max=len(THING_NAMES) - 1)]
        thing = thing + batch.center.unsqueeze(-1) * self.center
        shows = (batch.color < len(COLOR_NAMES)).unsqueeze(-1)
        return torch.where(shows, thing, self.nothing) + words[self.place_words][self.places]

    def tower_loss(self, states: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Loss of the patch labels and of the summary on CLS, and shares of thing patches that are named right."""
        scores = self.patch_head(states[:, 1:])
        sizes = [len(COLOR_NAMES) + 1, len(THING_NAMES) + 1, len(PLACES), 1]
        color, name, place, center = scores.split(sizes, -1)
        weight = torch.where(batch.color < len(COLOR_NAMES), 1.0, 0.25).flatten()
        weight = weight / weight.sum()
        loss = (weight * F.cross_entropy(color.flatten(0, 1), batch.color.flatten(), reduction="none")).sum()
        loss = loss + (weight * F.cross_entropy(name.flatten(0, 1), batch.name.flatten(), reduction="none")).sum()
        loss = loss + 0.2 * F.cross_entropy(place.flatten(0, 1), self.places.repeat(len(place)))
        centered = F.binary_cross_entropy_with_logits(center.flatten(), batch.center.flatten(), reduction="none")
        loss = loss + (weight * centered).sum()
        loss = loss + F.binary_cross_entropy_with_logits(self.summary_head(states[:, 0]), batch.summary)
        with torch.no_grad():
            right = name.argmax(-1) == batch.name
            shape = batch.name < len(SHAPES)
            digit = (batch.name >= len(SHAPES)) & (batch.name < len(THING_NAMES))
            shares = {
                "shape": right[shape].float().mean().item(),
                "digit": right[digit].float().mean().item(),
                "color": (color.argmax(-1) == batch.color)[shape | digit].float().mean().item(),
            }
        return loss, shares

    def answer_loss(self, visual: Tensor, batch: Batch, positions: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the answers, and `(scenes, turns)` whether each is right.

        `positions` `(scenes, visual)` are the visual tokens' places in the prompt, counted from its start, and `seen`
        whether they are there at all.
        """
        device = visual.device
        scenes, turns = batch.turns.shape[:2]
        start = torch.tensor([self.vocabulary["<s>"], self.vocabulary["<user>"]], device=device)
        tokens = torch.cat([start.expand(scenes, 2), batch.turns.flatten(1)], 1)
        embeddings = self.language.embed_tokens(tokens)
        embeddings = torch.cat([embeddings[:, :2], visual, embeddings[:, 2:]], 1)
        prefix = 2 + visual.shape[1]
        begin = torch.where(seen, positions, 1).amax(1) + 1
        turn_positions = begin[:, None] + torch.arange(TURN, device=device).repeat(turns)
        head = torch.arange(2, device=device).expand(scenes, 2)
        position_ids = torch.cat([head, positions, turn_positions], 1)
        mask = packed_mask(prefix, turns, device) & F.pad(seen, (2, turns * TURN), value=True)[:, None, None]
        states = self.language(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state[:, prefix:]
        labels = batch.labels.flatten(1)
        asked = labels != NO_LABEL
        scores = states[asked] @ self.language.embed_tokens.weight.T
        loss = F.cross_entropy(scores, labels[asked])
        with torch.no_grad():
            right = torch.zeros_like(labels, dtype=torch.bool)
            right[asked] = scores.argmax(-1) == labels[asked]
            answers = torch.arange(TURN, device=device).repeat(turns) == batch.answer_at.repeat_interleave(TURN, 1)
        return loss, right[answers].view(scenes, turns)


def packed_mask(prefix: int, turns: int, device: torch.device) -> Tensor:
    """What each token of a packed sequence may attend to: the prefix and its own turn, up to itself. `(1, 1, n, n)`."""
    total = prefix + turns * TURN
    turn = (torch.arange(total, device=device) - prefix).div(TURN, rounding_mode="floor")
    turn[:prefix] = -1
    same = (turn[:, None] == turn[None]) | (turn[None] == -1)
    return (same & torch.ones(total, total, dtype=torch.bool, device=device).tril())[None, None]


def patch_places() -> np.ndarray:
    """The cell that each patch lies in."""
    row, column = np.divmod(np.arange(PATCHES), SIDE)
    return row // 4 * 3 + column // 4


@dataclass
class Batch:
    """Scenes as tensors. Classes of patches: one beyond the last colour or name stands for the background."""

    pixels: Tensor
    color: Tensor
    name: Tensor
    center: Tensor
    summary: Tensor
    turns: Tensor
    labels: Tensor
    answer_at: Tensor

    SUMMARY = len(COLOR_NAMES) + len(THING_NAMES) + len(PAIRS)

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def crowded_scene(index: int) -> Scene:
    """A scene with seven to nine things, half of them digits, which vary more than in the benchmark's scenes."""
    key = (0, 99, index)
    rng = np.random.default_rng(key)
    things = []
    for cell in rng.permutation(len(PLACES))[: rng.integers(7, len(PLACES) + 1)].tolist():
        color = COLOR_NAMES[rng.integers(len(COLOR_NAMES))]
        if rng.random() < 0.5:
            digit = place_digit(rng, "train", color, cell)
            things.append(replace(digit, size=float(rng.uniform(19, 27)), angle=float(rng.uniform(-18, 18))))
        else:
            things.append(place_thing(rng, list(SHAPES)[rng.integers(len(SHAPES))], color, cell))
    return Scene(tuple(things), "", key)


def make_turns(scene: Scene, vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and labels, both `(turns, TURN)`, and where in each turn the answer is asked for."""
    rng = np.random.default_rng((*scene.key, 3))
    tokens = np.full((sum(TURNS.values()), TURN), vocabulary["<pad>"])
    labels = np.full_like(tokens, NO_LABEL)
    asked = np.zeros(len(tokens), np.int64)
    row = 0
    for category, count in TURNS.items():
        for number in range(count):
            if category == "counting" and number:
                names = sorted({thing.name for thing in scene.shapes})
                question, answers = ask_count(scene, names[rng.integers(len(names))])
            else:
                question, answers = ask(scene, category, rng)
            words = question.lower().replace("?", " ?").split()
            turn = [vocabulary[word] for word in [*words, "<assistant>", answers[0]]]
            tokens[row, : len(turn)] = turn
            labels[row, len(turn) - 2 : len(turn)] = turn[-1], vocabulary["</s>"]
            asked[row] = len(turn) - 2
            row += 1
    return tokens, labels, asked


def make_batch(scenes: Iterable[Scene], vocabulary: dict[str, int], turns: bool = True) -> Batch:
    columns: list[tuple[np.ndarray, ...]] = []
    for scene in scenes:
        pixels, coverage = paint(scene)
        cover = coverage.reshape(-1, SIDE, PATCH, SIDE, PATCH).mean((2, 4)).reshape(-1, PATCHES)
        at = [int(t.center[1] // PATCH) * SIDE + int(t.center[0] // PATCH) for t in scene.things]
        cover[np.arange(len(at)), at] = 1
        owner = np.where(cover.max(0) >= 0.12, cover.argmax(0), len(scene.things))
        color = np.array([*(COLOR_NAMES.index(t.color) for t in scene.things), len(COLOR_NAMES)])[owner]
        name = np.array([*(THING_NAMES.index(t.name) for t in scene.things), len(THING_NAMES)])[owner]
        center = np.zeros(PATCHES, np.float32)
        center[at] = 1
        summary = np.zeros(Batch.SUMMARY, np.float32)
        for thing in scene.things:
            summary[COLOR_NAMES.index(thing.color)] = 1
            summary[len(COLOR_NAMES) + THING_NAMES.index(thing.name)] = 1
            if thing.sample is None:
                summary[len(COLOR_NAMES) + len(THING_NAMES) + PAIRS.index((thing.name, thing.color))] = 1
        asked = make_turns(scene, vocabulary) if turns else (np.zeros(0, np.int64),) * 3
        columns.append((pixels, color, name, center, summary, *asked))
    arrays = [torch.from_numpy(np.stack(column)) for column in zip(*columns, strict=True)]
    images = (arrays[0].float() / 255 - 0.5) / 0.5
    return Batch(images.permute(0, 3, 1, 2).contiguous(), *arrays[1:])


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is orthogonalised (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

    Written here because `torch.optim.Muon` computes in bfloat16, which many CPUs emulate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(mean, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalize(torch.stack(updates)), strict=True):
                    parameter.sub_(update, alpha=scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearest half-orthogonal matrices, roughly, by five Newton-Schulz steps."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def rank() -> int:
    """Number of this process among those that train a phase together."""
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over the processes that train together."""
    if workers() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= workers()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@dataclass
class Phase:
    """A training run over numbered batches, saved as it goes."""

    name: str
    steps: int
    modules: list[nn.Module | nn.Parameter]
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    matrix_rate: float
    rate: float
    warmup: int = 100
    check: Callable[[], str] | None = None
    averages: dict[str, float] = field(default_factory=dict)

    def run(self, student: Student, output: Path) -> None:
        file = output / f"{self.name}.pt"
        parameters: list[nn.Parameter] = []
        for module in self.modules:
            parameters += [module] if isinstance(module, nn.Parameter) else module.parameters()
        parameters = list(dict.fromkeys(parameters))
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        embeddings = student.language.embed_tokens.weight
        tables = {embeddings, student.tower.embeddings.position_embedding.weight}
        heads = {p for head in (student.patch_head, student.summary_head, student.last_head) for p in head.parameters()}
        matrices = [p for p in parameters if p.ndim == 2 and p not in tables | heads]
        others = [p for p in parameters if p not in set(matrices)]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(others, lr=self.rate, betas=(0.9, 0.98))]
        rates = [self.rate]
        if matrices:
            optimizers.append(Muon(matrices, lr=self.matrix_rate))
            rates.append(self.matrix_rate)
        first = 0
        if file.exists():
            state = torch.load(file, map_location=embeddings.device)
            student.load_state_dict(state["student"])
            first = state["step"]
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        begun = time.time()
        for step in range(first, self.steps):
            progress = step / self.steps
            factor = min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for optimizer, rate in zip(optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
            loss, figures = self.loss(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for key, value in {"loss": loss.item(), **figures}.items():
                if value == value:
                    self.averages[key] = 0.95 * self.averages.get(key, value) + 0.05 * value
            done = step + 1
            if rank():
                continue
            if done % 50 == 0 or done == self.steps:
                pace = (time.time() - begun) / (done - first)
                text = " ".join(f"{key} {value:.3f}" for key, value in self.averages.items())
                print(f"{self.name} {done}/{self.steps} {pace:.2f} s/step {text}", flush=True)
            if done % 100 == 0 or done == self.steps:
                if self.check:
                    print(f"{self.name} {done} held out: {self.check()}", flush=True)
                saved = [optimizer.state_dict() for optimizer in optimizers]
                state = {"student": student.state_dict(), "step": done, "optimizers": saved}
                torch.save(state, file.with_suffix(".part"))
                os.replace(file.with_suffix(".part"), file)


@dataclass
class Training:
    """The phases, over one student."""

    output: Path
    device: torch.device
    steps: dict[str, int]

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.processor = build_processor()
        self.vocabulary: dict[str, int] = self.processor.tokenizer.get_vocab()
        self.student = Student(self.vocabulary).to(self.device)

    def scenes(self, phase: str, step: int, crowded: bool = False, turns: bool = True) -> Batch:
        """This process's share of a step's scenes, which no other step and no other phase trains on."""
        size = BATCH[phase] // workers()
        first = 10_000_000 * list(BATCH).index(phase) + (step * workers() + rank()) * size
        make = crowded_scene if crowded else lambda index: make_scene("train", index)
        return make_batch(map(make, range(first, first + size)), self.vocabulary, turns).to(self.device)

    def load(self, name: str, prefixes: tuple[str, ...] = ("",)) -> None:
        """Take over what an earlier phase learnt: the entries whose names begin with one of the prefixes."""
        state = torch.load(self.output / f"{name}.pt", map_location=self.device)["student"]
        self.student.load_state_dict({k: v for k, v in state.items() if k.startswith(prefixes)}, strict=False)

    def tower(self) -> Phase:
        student = self.student

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            batch = self.scenes("tower", step, crowded=step % 4 != 0, turns=False)
            states = student.see(batch.pixels)
            return student.tower_loss(states, batch)

        held_out = make_batch([make_scene("test", i, seed=1) for i in range(100)], self.vocabulary).to(self.device)

        @torch.no_grad()
        def check() -> str:
            figures = student.tower_loss(student.see(held_out.pixels), held_out)[1]
            return " ".join(f"{key} {value:.3f}" for key, value in figures.items())

        modules = [student.tower, student.patch_head, student.summary_head]
        return Phase("tower", self.steps["tower"], modules, loss, 0.02, 2e-3, check=check)

    def language(self) -> Phase:
        student = self.student

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            batch = self.scenes("language", step)
            generator = torch.Generator().manual_seed(step * workers() + rank())
            visual, positions, seen = oracle_prefix(student, batch, generator)
            value, right = student.answer_loss(visual, batch, positions, seen)
            return value, by_category(right)

        modules = [student.language, student.nothing, student.center]
        return Phase("language", self.steps["language"], modules, loss, 0.02, 2e-3)

    def align(self) -> Phase:
        student = self.student

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            batch = self.scenes("align", step)
            with torch.no_grad():
                target = student.oracle(batch)
                states = student.see(batch.pixels)
            value = alignment(student.projector(states[:, 1:]), target)
            return value, {}

        return Phase("align", self.steps["align"], [student.projector], loss, 0.02, 2e-3, check=self.check)

    def look(self) -> Phase:
        """Without it patches look mostly at other background, and what they look at tells nothing about the scene."""
        student = self.student
        layer = student.tower.encoder.layers[3]
        taught = copy.deepcopy(layer).requires_grad_(False)

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            batch = self.scenes("look", step, turns=False)
            with torch.no_grad():
                entering = student.see(batch.pixels, layers=3)
                features = taught(entering, None)
            moved = F.mse_loss(layer(entering, None), features) / features.var()
            things = (batch.color < len(COLOR_NAMES)).float()
            received = attention_map(layer, entering)[:, 1:, 1:].mean(1)
            share = (received * things).sum(-1) / received.sum(-1)
            figures = {"moved": moved.item(), "share": share.mean().item()}
            return 10 * moved - 0.5 * share.log().mean(), figures

        return Phase("look", self.steps["look"], [layer], loss, 0.02, 1e-3, warmup=10, check=self.check)

    def last(self) -> Phase:
        student = self.student

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            batch = self.scenes("last", step, turns=False)
            with torch.no_grad():
                states = student.see(batch.pixels)
            summary = student.tower.post_layernorm(student.tower.encoder.layers[4](states, None)[:, 0])
            return F.binary_cross_entropy_with_logits(student.last_head(summary), batch.summary), {}

        modules = [student.tower.encoder.layers[4], student.tower.post_layernorm, student.last_head]
        return Phase("last", self.steps["last"], modules, loss, 0.002, 1e-3)

    @torch.no_grad()
    def check(self) -> str:
        """Share of right answers on test scenes of another seed than the benchmark's."""
        batch = make_batch([make_scene("test", i, seed=1) for i in range(100)], self.vocabulary).to(self.device)
        visual = self.student.projector(self.student.see(batch.pixels)[:, 1:])
        positions = torch.arange(2, 2 + PATCHES, device=self.device).expand(len(visual), -1)
        everything = torch.ones_like(positions, dtype=torch.bool)
        right = self.student.answer_loss(visual, batch, positions, everything)[1]
        return " ".join(f"{category} {share:.3f}" for category, share in by_category(right).items())

    def export(self) -> None:
        """Write the checkpoint: weights as float16, everything else as transformers writes it."""
        folder = self.output / "model"
        half = LlavaForConditionalGeneration(self.student.llava.config)
        half.generation_config = self.student.llava.generation_config
        half.load_state_dict(self.student.llava.state_dict())
        half.half().save_pretrained(folder)
        self.processor.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = "float32"
        for part in ("text_config", "vision_config"):
            config[part]["dtype"] = "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def run(self, name: str) -> None:
        """Train one phase, from what the phases before it learnt, or go on with it."""
        if name == "align":
            self.load("language")
            self.load("tower", ("tower", "llava.model.vision_tower", "patch_head", "summary_head"))
        elif name == "look":
            self.load("align")
        elif name == "last":
            self.load("look")
            layers = self.student.tower.encoder.layers
            layers[4].load_state_dict(layers[3].state_dict())
        getattr(self, name)().run(self.student, self.output)
        if name == "last":
            self.export()


def oracle_prefix(student: Student, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Oracle tokens of some patches, the centres of all things among them, their positions, and whether they are seen.

    Short prefixes make this phase cheap. Tokens are noisy and a few are wrong, as a tower's are; in one scene of twenty
    nothing is seen, so that the model knows what to say without an image.
    """
    device = batch.color.device
    noisy = Batch(**vars(batch))
    wrong = (torch.rand(batch.color.shape, generator=generator) < 0.04).to(device) & (batch.color < len(COLOR_NAMES))
    other = torch.randint(len(THING_NAMES), batch.color.shape, generator=generator).to(device)
    noisy.name = torch.where(wrong, other, batch.name)
    visual = student.oracle(noisy)
    visual = visual + 0.04 * torch.randn(visual.shape, generator=generator).to(device)
    # The centres of things first, the rest in random order, things rather than background; then back into image order.
    order = torch.rand(batch.color.shape, generator=generator).to(device) - 2 * batch.center
    order = order + 0.5 * (batch.color == len(COLOR_NAMES))
    length = 32
    kept = order.argsort(1)[:, :length].sort(1).values
    visual = visual.gather(1, kept.unsqueeze(-1).expand(-1, -1, WIDTH))
    compact = (torch.rand(len(kept), 1, generator=generator) < 0.3).to(device)
    positions = 2 + torch.where(compact, torch.arange(length, device=device), kept)
    seen = (torch.rand(len(kept), 1, generator=generator) >= 0.05).to(device).expand(-1, length)
    return visual, positions, seen


def attention_map(layer: nn.Module, states: Tensor) -> Tensor:
    """What each token of an encoder layer attends to, averaged over heads: `(scenes, tokens, tokens)`."""
    attention = layer.self_attn
    split = (*states.shape[:2], attention.num_heads, attention.head_dim)
    normed = layer.layer_norm1(states)
    queries, keys = (project(normed).view(split).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    return (queries @ keys.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)


def alignment(projected: Tensor, target: Tensor) -> Tensor:
    """Squared distance of projected patches to their oracle tokens, relative to the size of the latter."""
    return F.mse_loss(projected, target) / target.var()


def by_category(right: Tensor) -> dict[str, float]:
    shares = right.float().mean(0).split(list(TURNS.values()))
    return {category: share.mean().item() for category, share in zip(CATEGORIES, shares, strict=True)}


def launch(options: argparse.Namespace) -> None:
    """Run the phases one after another, the first two side by side, each in processes of its own."""
    for names in (("tower", "language"), ("align",), ("look",), ("last",)):
        count = options.workers if len(names) == 1 else 1
        processes = []
        for name in names:
            meeting = options.output / f"{name}.meeting"
            meeting.unlink(missing_ok=True)
            for number in range(count):
                place = ["--phase", name, "--rank", str(number), "--workers", str(count)]
                processes.append(subprocess.Popen([sys.executable, *sys.argv, *place]))
        if any([process.wait() for process in processes]):
            raise SystemExit(f"phase {' or '.join(names)} failed; the cause is printed above")
    print(f"wrote {options.output / 'model'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/tiny_vlm"), help="folder of states and checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes that share a step; default 1 on a GPU, 2 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--phase", choices=list(STEPS), help="run this phase alone")
    parser.add_argument("--rank", type=int, default=0, help="which of a phase's processes this is")
    for name, count in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=count)
    options = parser.parse_args()
    options.workers = options.workers or (2 if options.device == "cpu" else 1)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.phase:
        launch(options)
        return
    torch.set_num_threads(options.threads)
    if options.workers > 1:
        meeting = (options.output / f"{options.phase}.meeting").resolve()
        dist.init_process_group("gloo", f"file://{meeting}", rank=options.rank, world_size=options.workers)
    steps = {name: getattr(options, f"{name}_steps") for name in STEPS}
    Training(options.output, torch.device(options.device), steps).run(options.phase)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
