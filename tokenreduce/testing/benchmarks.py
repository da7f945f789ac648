"""What every benchmark must keep to; each check takes a benchmark and how many of its samples to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageChops

from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.testing.invariants import InvariantError


def check_benchmark(benchmark: Benchmark, limit: int = 20) -> None:
    """Run every check on the first ``limit`` samples. Raises :class:`InvariantError` at the first that does not
    hold."""
    for check in BENCHMARK_INVARIANTS.values():
        check(benchmark, limit)


def samples_are_distinct(benchmark: Benchmark, limit: int) -> None:
    """There are samples, and every id stands for one of them."""
    ids = [sample.id for sample in _samples(benchmark, limit)]
    if not ids:
        raise InvariantError(f"{benchmark} has no samples")
    if twice := {each for each in ids if ids.count(each) > 1}:
        raise InvariantError(f"the sample id {min(twice)!r} is used more than once")


def samples_repeat(benchmark: Benchmark, limit: int) -> None:
    """A sample is the same whenever it is asked for, and so are its images."""
    for number, sample in enumerate(_samples(benchmark, limit)):
        if benchmark[number] != sample:
            raise InvariantError(f"sample {number} was {sample}, and then {benchmark[number]}")
        if not _same(_images(benchmark, sample), _images(benchmark, sample)):
            raise InvariantError(f"the images of sample {sample.id!r} differ from one look to the next")


def images_are_what_clusters_them(benchmark: Benchmark, limit: int) -> None:
    """Samples of one ``image_id`` show the same images."""
    first: dict[str, Sample] = {}
    for sample in _samples(benchmark, limit):
        other = first.setdefault(sample.image_id, sample)
        if not _same(_images(benchmark, other), _images(benchmark, sample)):
            raise InvariantError(
                f"samples {other.id!r} and {sample.id!r} share the image_id {sample.image_id!r} and no image"
            )


def scores_are_right(benchmark: Benchmark, limit: int) -> None:
    """An accepted answer scores above nothing said, and every score lies in [0, 1]."""
    for sample in _samples(benchmark, limit):
        scores = {answer: benchmark.score(answer, sample) for answer in (*sample.answers, "")}
        if outside := [answer for answer, score in scores.items() if not 0 <= score <= 1]:
            raise InvariantError(f"sample {sample.id!r}: {outside[0]!r} scores {scores[outside[0]]}, outside [0, 1]")
        if (
            sample.answers
            and max(scores[answer] for answer in sample.answers) <= scores[""]
            and "" not in sample.answers
        ):
            raise InvariantError(f"sample {sample.id!r}: none of {sample.answers} scores above an empty answer")


BENCHMARK_INVARIANTS: dict[str, Callable[[Benchmark, int], None]] = {
    check.__name__: check
    for check in (samples_are_distinct, samples_repeat, images_are_what_clusters_them, scores_are_right)
}


def _samples(benchmark: Benchmark, limit: int) -> list[Sample]:
    return [benchmark[number] for number in range(min(limit, len(benchmark)))]


def _images(benchmark: Benchmark, sample: Sample) -> Sequence[Image.Image]:
    """The sample's images; one that cannot be read is allowed to be there, and shows nothing."""
    try:
        images = benchmark.images(sample)
    except Exception:  # the benchmark's own business; in a run it becomes a record with that error
        return ()
    if wrong := [image for image in images if not isinstance(image, Image.Image)]:
        raise InvariantError(f"sample {sample.id!r} shows a {type(wrong[0]).__name__}, not a PIL image")
    return images


def _same(these: Sequence[Image.Image], those: Sequence[Image.Image]) -> bool:
    pairs = list(zip(these, those, strict=False))
    return len(these) == len(those) and all(
        one.size == other.size and one.mode == other.mode and ImageChops.difference(one, other).getbbox() is None
        for one, other in pairs
    )
