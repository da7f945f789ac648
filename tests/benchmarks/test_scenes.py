"""Properties of the generated scenes: what they promise a user who reads scores on them."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.benchmarks.scenes import (
    CATEGORIES,
    COLORS,
    PLACES,
    SHAPES,
    SIZE,
    Scene,
    Scenes,
    ask,
    draw,
    make_scene,
    paint,
)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes()


@pytest.fixture(scope="module")
def samples(scenes: Scenes) -> list[Sample]:
    return [scenes[i] for i in range(len(scenes))]


def scene_of(benchmark: Scenes, index: int) -> Scene:
    return make_scene(benchmark.split, index // len(CATEGORIES), benchmark.seed)


def true_answer(scene: Scene, question: str) -> str:
    """The answer, worked out from the scene and the words of the question alone."""
    words = question.lower().rstrip("?").split()
    match words:
        case ["is", "there", "a", color, shape]:
            return "yes" if any((t.color, t.name) == (color, shape) for t in scene.things) else "no"
        case ["what", "color", "is", "the", shape]:
            (color,) = [t.color for t in scene.things if t.name == shape]
            return color
        case ["how", "many", shapes, "are", "there"]:
            return str(sum(SHAPES.get(t.name) == shapes for t in scene.things))
        case ["where", "is", "the", color, shape]:
            (center,) = [t.center for t in scene.things if (t.color, t.name) == (color, shape)]
            return PLACES[int(center[1] // (SIZE / 3)) * 3 + int(center[0] // (SIZE / 3))]
        case ["which", "digit", "is", color]:
            (digit,) = [t.name for t in scene.things if t.color == color and t.name.isdigit()]
            return digit
    raise AssertionError(f"unexpected question {question!r}")


def test_has_enough_questions_in_every_category(samples: list[Sample]) -> None:
    counts = Counter(sample.category for sample in samples)
    assert len(samples) >= 1000
    assert len(counts) >= 5
    assert min(counts.values()) >= 150


def test_every_answer_is_true_of_its_scene(scenes: Scenes, samples: list[Sample]) -> None:
    for index, sample in enumerate(samples):
        assert sample.answers[0] == true_answer(scene_of(scenes, index), sample.question), sample


def test_score_accepts_the_answers_and_nothing_else(scenes: Scenes, samples: list[Sample]) -> None:
    for sample in samples[:20]:
        for answer in sample.answers:
            assert scenes.score(f" {answer.upper()}.", sample) == 1
        assert scenes.score("", sample) == 0
        assert scenes.score("elephant", sample) == 0


def test_answers_are_balanced(samples: list[Sample]) -> None:
    """Guessing every category's most frequent answer must not pay."""
    answers: dict[str, Counter[str]] = {category: Counter() for category in CATEGORIES}
    for sample in samples:
        answers[sample.category][sample.answers[0]] += 1
    best = {category: max(counts.values()) / counts.total() for category, counts in answers.items()}
    assert best["existence"] < 0.6
    assert best["counting"] < 0.35
    assert max(best["attribute"], best["position"], best["reading"]) < 0.25


def test_absent_pairs_are_adversarial(scenes: Scenes, samples: list[Sample]) -> None:
    for index, sample in enumerate(samples):
        if sample.answers == ("no",):
            color, shape = sample.question.rstrip("?").split()[-2:]
            things = scene_of(scenes, index).things
            assert any(thing.color == color for thing in things)
            assert any(thing.name == shape for thing in things)


def test_samples_are_deterministic_and_do_not_depend_on_the_count(samples: list[Sample]) -> None:
    few = Scenes(count=4)
    assert [few[i] for i in range(len(few))] == samples[: len(few)]
    first, again = few.images(few[7])[0], Scenes(count=9).images(samples[7])[0]
    assert first.size == (SIZE, SIZE)
    assert first.tobytes() == again.tobytes()


def test_identifiers_are_unique_and_scenes_come_one_after_another(scenes: Scenes, samples: list[Sample]) -> None:
    assert len({sample.id for sample in samples}) == len(samples)
    assert len({sample.image_id for sample in samples}) == scenes.count
    for first in range(0, len(samples), len(CATEGORIES)):
        group = samples[first : first + len(CATEGORIES)]
        assert tuple(sample.category for sample in group) == CATEGORIES
        assert len({sample.image_id for sample in group}) == 1


def test_another_seed_gives_other_scenes() -> None:
    pictures = {draw(make_scene("test", 3, seed)).tobytes() for seed in range(3)}
    assert len(pictures) == 3


def test_train_and_test_share_no_digit_and_no_scene() -> None:
    digits: dict[str, set[int | None]] = {}
    layouts = {}
    for split in ("train", "test"):
        scenes = [make_scene(split, index) for index in range(200)]
        digits[split] = {thing.sample for scene in scenes for thing in scene.digits}
        layouts[split] = {tuple((t.name, t.color, t.cell, t.center) for t in scene.things) for scene in scenes}
    assert not digits["train"] & digits["test"]
    assert not layouts["train"] & layouts["test"]
    assert all(len(found) == 200 for found in layouts.values())


def test_things_lie_inside_their_cells_and_show() -> None:
    for index in range(60):
        scene = make_scene("test", index)
        pixels, coverage = paint(scene)
        assert coverage.sum(0).max() <= 1 + 1e-6, "things must not overlap"
        for thing, cover in zip(scene.things, coverage, strict=True):
            rows, columns = np.nonzero(cover)
            row, column = divmod(thing.cell, 3)
            assert row * 32 <= rows.min() and rows.max() < (row + 1) * 32
            assert column * 32 <= columns.min() and columns.max() < (column + 1) * 32
            assert cover.sum() > 40, f"{thing} is too small to be seen"
            seen = pixels[cover > 0.99].mean(0)
            nearest = min(COLORS, key=lambda color: float(np.abs(seen - np.array(COLORS[color])).sum()))
            assert nearest == thing.color


def test_digits_are_as_varied_as_handwriting() -> None:
    used = {thing.sample for index in range(250) for thing in make_scene("test", index).digits}
    assert len(used) > 200


def test_one_sample_draws_no_other_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = make_scene

    def counting(split: str, index: int, seed: int = 0) -> Scene:
        made.append(index)
        return original(split, index, seed)

    monkeypatch.setattr("tokenreduce.benchmarks.scenes.make_scene", counting)
    benchmark = Scenes()
    sample = benchmark[1000]
    benchmark.images(sample)
    assert set(made) == {200}


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown split 'validation'.*train, test"):
        Scenes(split="validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make_scene("dev", 0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Scenes(count=0)
    with pytest.raises(ValueError, match=r"unknown category 'smell'.*existence"):
        ask(make_scene("test", 0), "smell", np.random.default_rng(0))
    with pytest.raises(IndexError, match="sample 5 of 5"):
        Scenes(count=1)[5]


def test_can_be_iterated() -> None:
    benchmark = Scenes(count=2)
    assert len(list(islice(iter(benchmark), 100))) == len(benchmark)
