"""The result of a comparison. These dataclasses are its schema, and ``metrics.json`` is their form.

Counts, FLOPs and bytes are means over samples; scores, agreements and differences of them are shares in [0, 1]; times
are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenreduce.evaluation.prompts import PLACE
from tokenreduce.evaluation.records import StorageError, storage, write_atomically
from tokenreduce.evaluation.schema import SchemaError, from_json, to_json
from tokenreduce.evaluation.statistics import Estimate

METRICS = "metrics.json"
SCHEMA = 2

UNREDUCED, REDUCER, RANDOM = "unreduced", "reducer", "random"
"""The methods of a comparison, as :attr:`Result.methods` names them."""


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison. ``limit`` takes the first samples only.

    random_seeds: draws of the random baseline; 0 leaves it out.
    timing_pairs: how often each method is timed; 0 leaves times and memory out.
    """

    batch_size: int = 32
    limit: int | None = None
    max_new_tokens: int = 16
    prompt: str = PLACE
    random_seeds: int = 5
    timing_pairs: int = 30

    def __post_init__(self) -> None:
        for name in ("random_seeds", "timing_pairs"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value} is negative; 0 leaves it out")


@dataclass(frozen=True)
class RunResult:
    """The run of the reducer: its content hash, its folder's name, and what the hash is of."""

    hash: str
    folder: str
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class BudgetResult:
    """The budget that the reducer was held to. What was really spent stands with the methods.

    value:       as it was given: a share of the unreduced model's figure, or a number of tokens.
    asked:       the same in the currency's unit; expected: what the knob that was found should cost.
    least, most: what was possible; whole: what the unreduced model costs.
    """

    currency: Literal["tokens", "layer_mean", "flops"]
    value: float
    asked: float
    expected: float
    least: float
    most: float
    whole: float


@dataclass(frozen=True)
class Failure:
    """A sample that a method could not answer, and why."""

    id: str
    method: str
    error: str


@dataclass(frozen=True)
class BenchmarkResult:
    """The questions that were asked.

    samples, images: how many every method answered, and of how many images they are. Only these are compared.
    categories:      the number of samples in each.
    errors:          how many samples are left out, since some method failed at them; failed: these.
    """

    name: str
    samples: int
    images: int
    categories: Mapping[str, int]
    errors: int
    failed: Sequence[Failure]


@dataclass(frozen=True)
class Machine:
    """FLOPs a second of a matrix product in the model's precision, and bytes a second of a copy, both measured."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Limits(Machine):
    """A machine's speeds, and what they mean for one model.

    break_even_tokens: the length of a prompt whose prefill at batch 1 computes as long as it reads weights; a shorter
                       one is memory-bound.
    """

    break_even_tokens: float


@dataclass(frozen=True)
class Bound:
    """One forward call of a language model at batch 1.

    intensity:    FLOPs for every byte that it must move.
    memory_bound: True if moving takes longer than computing.
    seconds:      the longer of the two; no implementation is faster.
    """

    intensity: float
    memory_bound: bool
    seconds: float


@dataclass(frozen=True)
class Roofline:
    """The bounds of a prompt's ``prefill``, and of the ``decode`` of one token after it."""

    prefill: Bound
    decode: Bound


@dataclass(frozen=True)
class Spread:
    """Seconds: the ``median``, and as ``low`` and ``high`` the 10 % and 90 % quantiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timed(Spread):
    """A spread, and as ``ratio`` its median to the unreduced model's, paired by prompt."""

    ratio: Estimate


@dataclass(frozen=True)
class Parts:
    """The parts of the time to first token: vision tower and projector, what the reducer adds, and everything else."""

    vision: Spread
    selection: Spread
    llm: Spread


@dataclass(frozen=True)
class FirstToken(Timed):
    """The time to first token; the medians of its ``parts`` need not add up to it."""

    parts: Parts


@dataclass(frozen=True)
class Measured:
    """Measurements on the machine at hand, side by side for all methods; None where there is none.

    peak_memory: bytes while one batch is answered.
    """

    time_to_first_token: FirstToken | None = None
    decode_per_token: Timed | None = None
    roofline: Roofline | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of a sample.

    total: before reduction; kept: entering the language model, of the samples the fewest and the most as well.
    layer_mean: at the input of a decoder layer, averaged over layers.
    """

    total: float
    kept: float
    fewest: float
    most: float
    layer_mean: float


@dataclass(frozen=True)
class PrefillFlops:
    """FLOPs of the language model and of vision tower and projector; as ratios to the unreduced model's: of the former,
    and of both together."""

    llm: float
    vision: float
    llm_ratio: float
    total_ratio: float


@dataclass(frozen=True)
class CategoryResult:
    """One method on the samples of one category."""

    samples: int
    score: Estimate
    difference_to_unreduced: Estimate | None


@dataclass(frozen=True)
class Measure(Estimate):
    """A figure that the benchmark computes of all answers together, in its own unit."""

    difference_to_unreduced: Estimate | None = None


@dataclass(frozen=True)
class MethodResult:
    """One method of a comparison, on the samples that every method answered.

    runs:        the names of its runs' folders; several differ by seed, and figures are means over them.
    errors:      how many answers failed.
    seed_scores: the score of each run.
    agreement:   the share of answers that are word for word the unreduced model's; changed: the number of the others.
    kv_bytes:    the key-value cache after prefill.
    measures:    the benchmark's own figures by name.
    paper_flops_ratio: what papers print: prefill FLOPs by FastV's formula, without the text, to the unreduced model's.
    """

    name: str
    knobs: Mapping[str, Any]
    runs: Sequence[str]
    errors: int
    score: Estimate
    difference_to_unreduced: Estimate | None
    difference_to_random: Estimate | None
    categories: Mapping[str, CategoryResult]
    seed_scores: Sequence[float]
    agreement: float
    changed: float
    visual_tokens: VisualTokens
    prefill_flops: PrefillFlops
    kv_bytes: float
    time_to_first_token: FirstToken | None
    decode_per_token: Timed | None
    roofline: Roofline | None
    peak_memory: int | None
    measures: Mapping[str, Measure]
    paper_flops_ratio: float


@dataclass(frozen=True)
class Result:
    """A comparison of a reducer with the unreduced model and with random selection of as many tokens.

    machine: None where nothing was measured.
    methods: ``unreduced``, ``reducer`` and ``random``, in this order. The second is absent where the reducer is
             ``none``, the third where nothing was dropped or no draws were asked for.
    """

    run: RunResult
    budget: BudgetResult | None
    benchmark: BenchmarkResult
    machine: Limits | None
    methods: Mapping[str, MethodResult]
    settings: Settings

    def __post_init__(self) -> None:
        if UNREDUCED not in self.methods:
            raise ValueError(f"methods.{UNREDUCED} is missing")

    @property
    def unreduced(self) -> MethodResult:
        return self.methods[UNREDUCED]

    @property
    def reducer(self) -> MethodResult | None:
        return self.methods.get(REDUCER)

    @property
    def random(self) -> MethodResult | None:
        return self.methods.get(RANDOM)

    @property
    def main(self) -> MethodResult:
        """The method that the comparison is about: the reducer, or the unreduced model where it stands alone."""
        return self.reducer or self.unreduced

    def write(self, folder: Path) -> None:
        """Write ``metrics.json`` into a folder."""
        write_atomically(folder / METRICS, to_json(self, SCHEMA, indent=1) + "\n")


def read_result(folder: Path | str) -> Result:
    """The result of a finished comparison.

    Raises ``StorageError`` where there is none, and where it is of another version or no result at all.
    """
    path = Path(folder) / METRICS
    with storage(path, "read"):
        text = path.read_text(encoding="utf-8")
    try:
        return from_json(Result, text, SCHEMA)
    except SchemaError as error:
        raise StorageError(f"{path}: {error}") from error
    except ValueError as error:
        raise StorageError(f"{path}: {error}; delete it and run the same command again") from error
