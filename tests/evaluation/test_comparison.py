"""The whole comparison, as a caller runs it: methods side by side on the same samples, each answered once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tokenreduce import create
from tokenreduce.evaluation import (
    Comparer,
    Result,
    Settings,
    Silent,
    StorageError,
    TransformersBackend,
    compare,
    read_records,
    read_result,
    statistics,
)
from tokenreduce.evaluation.result import SCHEMA
from tokenreduce.reducer import (
    AtDecoder,
    AtProjector,
    Geometry,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    best,
)

Compare = Callable[..., tuple[Path, Result]]


@dataclass(frozen=True)
class Loud(TokenReducer):
    """Adaptive: keep the tokens whose norm is above a threshold, possibly none."""

    threshold: float = 1.0

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector()]

    def count(self, step: Step, span: Span) -> None:
        return None

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        norms = tokens.features.norm(dim=-1)
        return Selection(best(norms, int((norms > self.threshold * norms.mean()).sum())))


@dataclass(frozen=True)
class Late(TokenReducer):
    """Drop all but the first four tokens in the middle of the language model."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtDecoder(keep=4, layer=0.5)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(tokens.index.new_tensor(range(tokens.keep)))


class Answered(Silent):
    """Counts the answers that were made, not found."""

    def __init__(self) -> None:
        self.phase = ""
        self.made: dict[str, int] = {}

    def start(self, phase: str, total: int, done: int = 0) -> None:
        self.phase = phase
        self.made.setdefault(phase, 0)

    def advance(self, count: int = 1) -> None:
        self.made[self.phase] += count


@pytest.fixture
def run(model: Any, processor: Any, cards: Any, tmp_path: Path) -> Compare:
    def run(reducer: TokenReducer, benchmark: Any = None, **settings: Any) -> tuple[Path, Result]:
        options = {key: settings.pop(key) for key in ("progress", "config") if key in settings}
        chosen = Settings(**{"batch_size": 4, "max_new_tokens": 2, "random_seeds": 2, "timing_pairs": 2, **settings})
        return compare(model, processor, benchmark or cards(count=12), reducer, tmp_path, chosen, **options)

    return run


def test_a_comparison_says_what_a_table_needs(run: Compare, tmp_path: Path) -> None:
    folder, result = run(create("random", keep=12, seed=7), config={"reducer": {"name": "random"}})
    assert result == read_result(folder)
    assert folder.parent == tmp_path and folder.name == f"random-{result.run.hash}" == result.run.folder
    config = OmegaConf.load(folder / "config.yaml")
    assert config.hash == result.run.hash and config.config.reducer.name == "random"
    assert config.identity.reducer.knobs.keep == 12
    assert list(result.methods) == ["unreduced", "reducer", "random"]
    assert result.benchmark.samples == 12 and result.benchmark.images == 4
    for name, row in result.methods.items():
        assert row.score.low is not None and row.score.high is not None
        assert 0 <= row.score.low <= row.score.value <= row.score.high <= 1
        assert row.visual_tokens.total == 36 and row.visual_tokens.kept == (36 if name == "unreduced" else 12)
        assert (row.prefill_flops.llm_ratio < 0.6) == (name != "unreduced")
        assert row.prefill_flops.llm_ratio <= row.prefill_flops.total_ratio <= 1
        assert set(row.categories) == {"odd", "even"} and row.categories["odd"].samples == 6
        assert row.time_to_first_token is not None
        assert row.time_to_first_token.median > 0 and row.time_to_first_token.ratio.value > 0
        assert row.peak_memory is None or row.peak_memory > 1 << 20
        assert (row.difference_to_unreduced is None) == (name == "unreduced")
        assert (row.difference_to_random is None) == (name != "reducer")
    assert result.random is not None and len(result.random.runs) == len(result.random.seed_scores) == 2
    assert result.unreduced.agreement == 1 and result.unreduced.changed == 0


def test_metrics_json_is_the_form_of_the_result(run: Compare) -> None:
    """Every field under its own name, and the schema's version first."""
    folder, result = run(create("uniform"))
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert list(content) == ["schema", "run", "budget", "benchmark", "machine", "methods", "settings"]
    assert content == {"schema": SCHEMA, **json.loads(json.dumps(asdict(result)))}
    assert content["methods"]["reducer"]["time_to_first_token"]["parts"]["llm"]["median"] > 0


def test_figures_are_those_of_the_records(run: Compare, tmp_path: Path) -> None:
    _, result = run(create("uniform", keep=33), timing_pairs=0, max_new_tokens=1)
    records = {key: [read_records(tmp_path / name) for name in row.runs] for key, row in result.methods.items()}
    (base,), (reduced,), seeds = records["unreduced"], records["reducer"], records["random"]
    images = [record.image_id for record in base]
    scores = {key: [record.score or 0 for record in each] for key, each in (("base", base), ("reduced", reduced))}
    random = [sum(record.score or 0 for record in same) / 2 for same in zip(*seeds, strict=True)]
    row = result.main
    assert row.difference_to_unreduced == statistics.difference(scores["reduced"], scores["base"], images)
    assert row.difference_to_random == statistics.difference(scores["reduced"], random, images)
    same = sum(one.answer == other.answer for one, other in zip(reduced, base, strict=True))
    assert 0 < same < 12, "the test can tell"
    assert row.agreement == same / 12 and row.changed == 12 - same
    assert row.time_to_first_token is None and row.peak_memory is None and result.machine is None


def test_nothing_is_answered_twice(run: Compare) -> None:
    first, again, other = Answered(), Answered(), Answered()
    run(create("uniform", keep=9), progress=first)
    assert first.made == {"unreduced": 12, "uniform": 12, "random 1 of 2": 12, "random 2 of 2": 12, "timing": 2}
    run(create("uniform", keep=9), progress=again)
    assert again.made == {"unreduced": 0, "uniform": 0, "random 1 of 2": 0, "random 2 of 2": 0, "timing": 2}
    run(create("pool", keep=9), progress=other)
    assert other.made == {"unreduced": 0, "pool": 12, "random 1 of 2": 0, "random 2 of 2": 0, "timing": 2}


def test_a_limit_takes_the_first_and_reuses_them(run: Compare) -> None:
    reducer, more = create("uniform"), Answered()
    _, part = run(reducer, limit=6, timing_pairs=0)
    _, whole = run(reducer, timing_pairs=0, progress=more)
    assert more.made["uniform"] == 6 and part.benchmark.samples == 6 and whole.benchmark.samples == 12
    less = Answered()
    assert run(reducer, limit=6, timing_pairs=0, progress=less)[1] == part
    assert set(less.made.values()) == {0}


def test_an_adaptive_reducer_is_matched_sample_by_sample(run: Compare, tmp_path: Path) -> None:
    _, result = run(Loud())
    counts = {record.id: record.entering or 0 for record in read_records(tmp_path / result.run.folder)}
    assert len(set(counts.values())) > 1, "the test can tell"
    assert result.random is not None
    for name in result.random.runs:
        assert {record.id: record.entering for record in read_records(tmp_path / name)} == counts
    kept = result.random.visual_tokens
    assert (kept.fewest, kept.most) == (min(counts.values()), max(counts.values()))


def test_dropping_inside_the_language_model_is_matched_by_the_mean_over_layers(run: Compare) -> None:
    _, result = run(Late(), timing_pairs=0)
    late, random = (result.methods[name].visual_tokens for name in ("reducer", "random"))
    assert late.kept == 36 and late.layer_mean == (36 + 36 + 4 + 4) / 4 == random.layer_mean
    assert random.kept == 20


@pytest.mark.parametrize("reducer", [Loud(threshold=1e6), create("no_image")])
def test_keeping_nothing_is_compared_with_no_image(run: Compare, reducer: TokenReducer) -> None:
    _, result = run(reducer)
    assert result.random is not None and result.main.difference_to_random is not None
    assert result.main.visual_tokens.kept == result.random.visual_tokens.kept == 0
    assert [name.split("-")[0] for name in result.random.runs] == ["no_image"], "one run: there is nothing to draw"
    assert result.main.difference_to_random.value == 0


@pytest.mark.parametrize("reducer", [Loud(threshold=0.0), create("uniform", keep=1.0)])
def test_keeping_everything_needs_no_random_baseline(run: Compare, reducer: TokenReducer) -> None:
    _, result = run(reducer, timing_pairs=0)
    assert list(result.methods) == ["unreduced", "reducer"]
    assert result.main.difference_to_unreduced is not None and result.main.difference_to_unreduced.value == 0


def test_the_unreduced_model_stands_alone(run: Compare) -> None:
    folder, result = run(create("none"))
    assert list(result.methods) == ["unreduced"] and folder.name.startswith("none-")


def test_random_can_be_left_out(run: Compare) -> None:
    _, result = run(create("uniform"), random_seeds=0, timing_pairs=0)
    assert list(result.methods) == ["unreduced", "reducer"]


def test_errors_count_for_nobody(run: Compare, cards: Any, tmp_path: Path) -> None:
    _, result = run(create("uniform"), cards(count=12, broken=(1,)))
    assert result.benchmark.samples == 9 and result.benchmark.errors == 3
    assert [failure.id for failure in result.benchmark.failed] == ["card-3", "card-4", "card-5"]
    records = read_records(tmp_path / result.unreduced.runs[0])
    scores = [record.score for record in records if record.score is not None]
    assert result.unreduced.score.value == pytest.approx(sum(scores) / 9)
    assert result.unreduced.errors == 3


def test_a_sample_that_one_method_failed_at_is_left_out_for_all(
    run: Compare, cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Moody(Loud):
        """Cannot do the first picture."""

        def select(self, step: Step, tokens: VisualTokens) -> Selection:
            seed = tokens.generator(0).initial_seed()
            first.append(seed)
            if seed == first[0]:
                raise RuntimeError("not this one")
            return super().select(step, tokens)

    first: list[int] = []
    _, result = run(Moody())
    assert result.benchmark.samples == 9
    assert {failure.error for failure in result.benchmark.failed} == {"RuntimeError: not this one"}
    assert [result.methods[name].errors for name in ("unreduced", "reducer", "random")] == [0, 3, 0]


def test_no_answers_at_all_is_an_error(run: Compare, cards: Any) -> None:
    with pytest.raises(ValueError, match=r"none of the 6 samples was answered.*image-0.png is truncated"):
        run(create("uniform"), cards(count=6, broken=(0, 1)))


def test_the_tested_reducer_is_not_harmed_by_who_ran_first(run: Compare, tmp_path: Path) -> None:
    _, one = run(create("uniform", keep=9), timing_pairs=0)
    (tmp_path / "second").mkdir()
    _, other = run(create("uniform", keep=9), timing_pairs=0)
    assert one == other


def test_missing_older_newer_and_broken_results_are_named(run: Compare, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*metrics.json: No such file"):
        read_result(tmp_path)
    for content, message in (
        ('{"schema": 1, "run": {}}', "metrics.json: schema 1 of an older .* run the same command again for a new one"),
        ('{"schema": 99}', "metrics.json: schema 99 of a newer .* use the version that wrote it"),
        ('{"schema": 2, "run": {"hash": "5f1c"}}', "metrics.json: benchmark is missing; delete it and run the same"),
        ("{", "metrics.json: Expecting property name"),
    ):
        (tmp_path / "metrics.json").write_text(content, encoding="utf-8")
        with pytest.raises(StorageError, match=message):
            read_result(tmp_path)


def test_a_result_of_another_schema_is_not_finished_and_written_anew(
    model: Any, processor: Any, cards: Any, tmp_path: Path
) -> None:
    settings = Settings(batch_size=4, max_new_tokens=1, random_seeds=0, timing_pairs=0)
    comparer = Comparer(TransformersBackend(model, processor), cards(count=4), tmp_path, settings)
    folder, result = comparer.compare(create("uniform"))
    (folder / "metrics.json").write_text('{"schema": 1}', encoding="utf-8")
    assert comparer.finished(create("uniform")) is None
    comparer.compare(create("uniform"))
    assert comparer.finished(create("uniform")) == (folder, result)


def test_negative_settings_are_named() -> None:
    with pytest.raises(ValueError, match="timing_pairs=-1 is negative; 0 leaves it out"):
        Settings(timing_pairs=-1)
