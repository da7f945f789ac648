"""Generated scenes: coloured shapes and handwritten digits, with questions that mirror the public benchmarks.

A scene is a 96x96 picture of coloured shapes and digits, each in its own cell of a 3x3 grid, on a dark uneven
background. Five questions are asked of it, one a category, each with a one-word answer:

========== =========================== ============= ==================================================================
category   question                    mirrors       what makes it hard
========== =========================== ============= ==================================================================
existence  Is there a red circle?      POPE          when the answer is no, both the colour and the shape do occur
attribute  What color is the star?     GQA           one such shape among others
counting   How many circles are there? MME           one to four of them
position   Where is the red circle?    MME           nine places; colour and shape have to be bound to find it
reading    Which digit is green?       TextVQA       real handwriting, never seen in training
========== =========================== ============= ==================================================================

Scenes test the machinery around a model, together with the small model trained on them; they say nothing about
photographs.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tokenreduce.benchmarks.benchmark import Benchmark, Sample

SIZE = 96
"""Width and height of a picture, in pixels."""
GRID = 3
"""Cells a side; every thing lies inside its own cell."""
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
"""Names of the cells, row by row."""
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (232, 64, 58),
    "green": (66, 184, 84),
    "blue": (64, 124, 242),
    "yellow": (250, 212, 62),
    "purple": (176, 92, 222),
    "white": (240, 240, 240),
}
SHAPES: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
"""Singular and plural."""
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
"""Answers of the counting questions, as a figure or in letters."""
CATEGORIES = ("existence", "attribute", "counting", "position", "reading")
SPLITS = ("train", "test")
TEST_DIGITS = 400
"""How many of the handwritten digits, the last of the file, are kept for the test split."""

_CELL = SIZE // GRID
_SUPERSAMPLING = 4

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Thing:
    """A shape or a digit of a scene.

    `name` is a shape or a numeral; `center` is `(x, y)` in pixels; `size` is the width of the box it is drawn in;
    `angle` is in degrees; `sample` is the row of the digits file, None for a shape.
    """

    name: str
    color: str
    cell: int
    center: tuple[float, float]
    size: float
    angle: float
    tint: tuple[int, int, int]
    sample: int | None = None


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `counted` is the shape its counting question is about; `key` seeds its background."""

    things: tuple[Thing, ...]
    counted: str
    key: tuple[int, ...]

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.sample is None)

    @property
    def digits(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.sample is not None)

    def count(self, shape: str) -> int:
        return sum(thing.name == shape for thing in self.shapes)


def make_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of a split: four or five shapes and two digits. It depends on nothing but the arguments."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: the splits of the scenes are {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must not be negative, got index={index} and seed={seed}")
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    while True:
        counted, pairs = _draw_shapes(rng)
        digit_colors = [str(color) for color in rng.choice(list(COLORS), 2, replace=False)]
        if _absent_pairs(pairs, digit_colors):
            break
    cells = rng.permutation(GRID * GRID)[: len(pairs) + 2].tolist()
    things = [place_thing(rng, name, color, cell) for (name, color), cell in zip(pairs, cells, strict=False)]
    for color, cell in zip(digit_colors, cells[len(pairs) :], strict=True):
        things.append(place_digit(rng, split, color, cell))
    return Scene(tuple(things), counted, key)


def _draw_shapes(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    """The shape to count and the (shape, colour) pairs of a scene: no pair twice, some shape that occurs once."""
    names = list(SHAPES)
    while True:
        count = int(rng.integers(1, 5))
        total = 5 if count == 4 else int(rng.integers(4, 6))
        counted, *others = (names[i] for i in rng.permutation(len(names)))
        shapes = [counted] * count + [others[i] for i in rng.integers(len(others), size=total - count)]
        if any(shapes.count(name) == 1 for name in shapes):
            break
    pairs: list[tuple[str, str]] = []
    for name in sorted(set(shapes)):
        pairs += [(name, str(color)) for color in rng.choice(list(COLORS), shapes.count(name), replace=False)]
    return counted, pairs


def _absent_pairs(pairs: list[tuple[str, str]], digit_colors: list[str]) -> list[tuple[str, str]]:
    """Pairs of a shape and a colour that both occur in the scene, but not together."""
    shapes = sorted({shape for shape, _ in pairs})
    colors = sorted({color for _, color in pairs} | set(digit_colors))
    return [(shape, color) for shape in shapes for color in colors if (shape, color) not in pairs]


def place_thing(rng: np.random.Generator, name: str, color: str, cell: int) -> Thing:
    """A shape somewhere inside a cell, with a random size, angle and tint."""
    return Thing(name, color, cell, _center(rng, cell, 5), float(rng.uniform(16, 20)), *_look(rng, color, 15))


def place_digit(rng: np.random.Generator, split: str, color: str, cell: int) -> Thing:
    """A handwritten digit of the split somewhere inside a cell."""
    _, labels = _digits()
    first = len(labels) - TEST_DIGITS
    sample = int(rng.integers(first)) if split == "train" else int(rng.integers(first, len(labels)))
    center, size = _center(rng, cell, 3.5), float(rng.uniform(22, 25))
    return Thing(str(labels[sample]), color, cell, center, size, *_look(rng, color, 8), sample)


def _center(rng: np.random.Generator, cell: int, jitter: float) -> tuple[float, float]:
    row, column = divmod(cell, GRID)
    dx, dy = rng.uniform(-jitter, jitter, 2)
    return (column + 0.5) * _CELL + float(dx), (row + 0.5) * _CELL + float(dy)


def _look(rng: np.random.Generator, color: str, angle: float) -> tuple[float, tuple[int, int, int]]:
    red, green, blue = np.clip(np.array(COLORS[color]) + rng.integers(-14, 15, 3), 0, 255).tolist()
    return float(rng.uniform(-angle, angle)), (red, green, blue)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    return Image.fromarray(paint(scene)[0])


def paint(scene: Scene) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pixels of a scene, `(96, 96, 3)`, and how much of every pixel each thing covers, `(things, 96, 96)` in [0, 1]."""
    pixels = _background(np.random.default_rng((*scene.key, 1)))
    coverage = np.zeros((len(scene.things), SIZE, SIZE), np.float32)
    for thing, cover in zip(scene.things, coverage, strict=True):
        row, column = divmod(thing.cell, GRID)
        area = slice(row * _CELL, (row + 1) * _CELL), slice(column * _CELL, (column + 1) * _CELL)
        x, y = thing.center[0] - column * _CELL, thing.center[1] - row * _CELL
        cover[area] = _shape_cover(thing, x, y) if thing.sample is None else _digit_cover(thing, x, y)
        alpha = cover[area][..., None]
        pixels[area] += alpha * (np.array(thing.tint, np.float32) - pixels[area])
    return np.clip(pixels, 0, 255).astype(np.uint8), coverage


def _background(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A dark, softly clouded background with grain."""
    clouds = rng.uniform(28, 84, (4, 4, 1)) + rng.uniform(-14, 14, (4, 4, 3))
    smooth = Image.fromarray(clouds.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    grain = rng.standard_normal((SIZE, SIZE, 1), np.float32)
    return np.asarray(smooth, np.float32) + np.float32(4) * grain


def _shape_cover(thing: Thing, x: float, y: float) -> npt.NDArray[np.float32]:
    """Coverage of a cell's pixels by a shape centred on `(x, y)` of the cell."""
    scale = _SUPERSAMPLING
    tile = Image.new("L", (_CELL * scale, _CELL * scale))
    radius = thing.size / 2
    pen = ImageDraw.Draw(tile)
    if thing.name == "circle":
        box = [(x - radius) * scale, (y - radius) * scale, (x + radius) * scale, (y + radius) * scale]
        pen.ellipse(box, fill=255)
    else:
        outline = _outline(thing.name) * radius
        turn = np.deg2rad(thing.angle)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        pen.polygon([(float(a), float(b)) for a, b in (outline @ rotation.T + (x, y)) * scale], fill=255)
    return np.asarray(tile.reduce(scale)).astype(np.float32) / np.float32(255)


@cache
def _outline(name: str) -> npt.NDArray[np.float64]:
    """Corners of a shape around the origin, about one unit from it; y points down."""
    if name == "square":
        return np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    if name == "triangle":
        return np.array([(0, -1.05), (1.05, 0.8), (-1.05, 0.8)])
    if name == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2 == 0, 1.15, 0.5)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    if name == "cross":
        arm, end = 0.32, 1.0
        quarter = np.array([(arm, -end), (arm, -arm), (end, -arm)])
        turns = [np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), k) for k in range(4)]
        return np.concatenate([quarter @ turn.T for turn in turns])
    raise ValueError(f"unknown shape {name!r}: the shapes are {', '.join(SHAPES)}")


def _digit_cover(thing: Thing, x: float, y: float) -> npt.NDArray[np.float32]:
    """Coverage of a cell's pixels by the strokes of a digit centred on `(x, y)` of the cell."""
    images, _ = _digits()
    ink = Image.fromarray(np.pad(images[thing.sample] * np.uint8(15), 1))
    turn, zoom = np.deg2rad(thing.angle), 8 / thing.size
    cos, sin = zoom * np.cos(turn), zoom * np.sin(turn)
    matrix = (cos, sin, 5 - cos * x - sin * y, -sin, cos, 5 + sin * x - cos * y)
    tile = ink.transform((_CELL, _CELL), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    # The digits are thumbnails, grey all over: a steeper ramp makes pen strokes of them again.
    return np.clip((np.asarray(tile, np.float32) - 70) / 90, 0, 1)


def _digits_file() -> bytes:
    return resources.files("tokenreduce").joinpath("assets/digits.npz").read_bytes()


@cache
def _digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images `(1797, 8, 8)`, ink 0 to 16, and labels of the digits file (see DIGITS.md beside it)."""
    with np.load(io.BytesIO(_digits_file())) as arrays:
        return arrays["images"], arrays["labels"]


def ask(scene: Scene, category: str, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A question of a category about a scene and its accepted answers, drawn with `rng`.

    Counting asks about the scene's `counted` shape, so that the answers one to four are equally frequent over scenes.
    """
    if category == "existence":
        pairs = [(thing.name, thing.color) for thing in scene.shapes]
        answer = ("no", "yes")[int(rng.integers(2))]
        if answer == "no":
            pairs = _absent_pairs(pairs, [thing.color for thing in scene.digits])
        shape, color = pairs[int(rng.integers(len(pairs)))]
        return f"Is there a {color} {shape}?", (answer,)
    if category == "attribute":
        once = [thing for thing in scene.shapes if scene.count(thing.name) == 1]
        thing = once[int(rng.integers(len(once)))]
        return f"What color is the {thing.name}?", (thing.color,)
    if category == "counting":
        return ask_count(scene, scene.counted)
    if category == "position":
        thing = scene.shapes[int(rng.integers(len(scene.shapes)))]
        return f"Where is the {thing.color} {thing.name}?", (PLACES[thing.cell],)
    if category == "reading":
        thing = scene.digits[int(rng.integers(len(scene.digits)))]
        return f"Which digit is {thing.color}?", (thing.name,)
    raise ValueError(f"unknown category {category!r}: the categories are {', '.join(CATEGORIES)}")


def ask_count(scene: Scene, shape: str) -> tuple[str, tuple[str, ...]]:
    """The counting question about a shape that occurs one to four times, and its accepted answers."""
    count = scene.count(shape)
    return f"How many {SHAPES[shape]} are there?", (str(count), COUNTS[count])


@dataclass(frozen=True)
class Scenes(Benchmark):
    """Generated scenes, five questions each: existence, attribute, counting, position and reading.

    Samples come scene by scene, so the first n are balanced over the categories and do not change with `count`.

    Parameters
    ----------
    split
        "test", or "train": the scenes and handwritten digits that the embedded model was trained on.
    count
        Number of scenes; five times as many samples.
    seed
        Another seed gives other scenes. The embedded model was trained with seed 0 of the train split.
    """

    description: ClassVar[str] = "coloured shapes and handwritten digits, generated; for the embedded model"

    split: Split = "test"
    count: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}: the splits of the scenes are {', '.join(SPLITS)}")
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def __len__(self) -> int:
        return self.count * len(CATEGORIES)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, position = divmod(index, len(CATEGORIES))
        scene = make_scene(self.split, number, self.seed)
        category = CATEGORIES[position]
        question, answers = ask(scene, category, np.random.default_rng((*scene.key, 2, position)))
        image_id = f"{self.split}-{self.seed}-{number}"
        return Sample(f"{image_id}-{category}", question, answers, category, image_id)

    def images(self, sample: Sample) -> list[Image.Image]:
        split, seed, number = sample.image_id.split("-")
        return [draw(make_scene(split, int(number), int(seed)))]

    def fingerprint(self) -> str:
        """Digest of the digits file, which the pictures are drawn with."""
        return hashlib.sha256(_digits_file()).hexdigest()
