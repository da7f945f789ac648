"""The columns of the report's tables: what each is called, means and shows, once for the page, Markdown and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenreduce.evaluation.result import Timed
from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.reporting.formatting import (
    NOT_MEASURED,
    milliseconds,
    percent,
    points,
    probability,
    quantity,
    ratio,
    size,
    tokens,
)
from tokenreduce.reporting.study import Row, Study


@dataclass(frozen=True)
class Column:
    """One column: what it is called and means, how a row is written in it, and the number that it is sorted by."""

    name: str
    title: str
    unit: str
    meaning: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | None]


def quality(study: Study) -> list[Column]:
    """The columns of what methods score, as far as the study has something in them."""
    return _used([_SCORE, *map(_measure, study.unreduced.method.measures), _LAYER_MEAN, *_QUALITY], study)


def costs(study: Study) -> list[Column]:
    """The columns of what methods cost, as far as it was measured."""
    return _used([_SCORE, _ENTERING, _LAYER_MEAN, *_COSTS], study)


def _used(wanted: Sequence[Column], study: Study) -> list[Column]:
    return [each for each in wanted if any(each.value(row) is not None for row in study.rows)]


def _measure(name: str) -> Column:
    """A figure that a benchmark computes of all answers together."""
    return Column(
        f"measure {name}",
        name,
        "",
        "The benchmark's own figure of all answers together, in its unit; its interval is by jackknife over images.",
        lambda row: quantity(row.method.measures.get(name)),
        lambda row: _value(row.method.measures.get(name)),
    )


def raw(study: Study, row: Row) -> dict[str, Any]:
    """A row in full precision under the names of the CSV table."""
    method, benchmark = row.method, row.comparison.result.benchmark
    visual, flops = method.visual_tokens, method.prefill_flops
    first, further = method.time_to_first_token, method.decode_per_token
    return {
        "benchmark": study.benchmark,
        "model": study.model,
        "method": row.label,
        "series": row.series,
        "role": row.key,
        "settings": json.dumps(method.knobs),
        "samples": benchmark.samples,
        "images": benchmark.images,
        **interval("score", method.score),
        **interval("difference_to_unreduced", method.difference_to_unreduced),
        "p_unreduced": row.p_unreduced,
        **interval("difference_to_random", method.difference_to_random),
        "p_random": row.p_random,
        **interval("retained", row.retained),
        "agreement": method.agreement,
        "lost": row.changes.lost if row.changes else None,
        "gained": row.changes.gained if row.changes else None,
        "p_mcnemar": row.changes.p_value if row.changes else None,
        **interval("hard_score", row.hard.score if row.hard else None),
        "hard_samples": row.hard.samples if row.hard else None,
        "visual_tokens": visual.total,
        "tokens_entering": visual.kept,
        "layer_mean": visual.layer_mean,
        "llm_flops": flops.llm,
        "vision_flops": flops.vision,
        "llm_flops_ratio": flops.llm_ratio,
        "prefill_flops_ratio": flops.total_ratio,
        "kv_bytes": method.kv_bytes,
        "first_token_seconds": first.median if first else None,
        "first_token_low": first.low if first else None,
        "first_token_high": first.high if first else None,
        **interval("first_token_ratio", first.ratio if first else None),
        **{f"first_token_{name}": spread.median for name, spread in (vars(first.parts) if first else {}).items()},
        "next_token_seconds": further.median if further else None,
        **interval("next_token_ratio", further.ratio if further else None),
        "peak_memory": method.peak_memory,
        **{name: measure.value for name, measure in method.measures.items()},
        "run": row.comparison.folder.name,
    }


def first_token_ratio(row: Row) -> Estimate | None:
    """The time to first token relative to the unreduced model's, measured beside it."""
    times = row.method.time_to_first_token
    return times.ratio if times else None


def interval(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """An estimate in three columns."""
    value, low, high = (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _value(estimate: Estimate | None) -> float | None:
    return estimate.value if estimate else None


_SCORE = Column(
    "score",
    "score",
    "%",
    "Right answers, ± half of a 95 % interval clustered by image: questions about one image are not independent.",
    lambda row: percent(row.method.score),
    lambda row: row.score,
)
_ENTERING = Column(
    "entering",
    "tokens in",
    "",
    "Visual tokens that enter the language model. Merged tokens, class tokens and the like count.",
    lambda row: tokens(row.method.visual_tokens.kept),
    lambda row: row.method.visual_tokens.kept,
)
_LAYER_MEAN = Column(
    "layer_mean",
    "layer mean",
    "tokens",
    "Visual tokens at the input of a decoder layer, averaged over layers: what a method inside the language model "
    "is fairly compared by.",
    lambda row: tokens(row.layer_mean),
    lambda row: row.layer_mean,
)
_QUALITY = (
    Column(
        "unreduced",
        "vs unreduced",
        "points",
        "The difference to the plain model on the same samples, with its paired 95 % interval. "
        "An interval around 0 means that this many samples cannot tell the two apart.",
        lambda row: points(row.method.difference_to_unreduced) if row.key != "unreduced" else "",
        lambda row: _value(row.method.difference_to_unreduced),
    ),
    Column(
        "p_unreduced",
        "p",
        "Holm",
        "Of the difference to unreduced being chance, corrected for the number of methods compared.",
        lambda row: probability(row.p_unreduced) if row.p_unreduced is not None else "",
        lambda row: row.p_unreduced,
    ),
    Column(
        "random",
        "vs random",
        "points",
        "The difference to tokens drawn at random, as many as the method kept of each sample. "
        "A method that does not beat it chose nothing worth choosing.",
        lambda row: points(row.method.difference_to_random) if row.method.difference_to_random else "",
        lambda row: _value(row.method.difference_to_random),
    ),
    Column(
        "p_random",
        "p",
        "Holm",
        "Of the difference to random being chance, corrected for the number of methods compared.",
        lambda row: probability(row.p_random) if row.p_random is not None else "",
        lambda row: row.p_random,
    ),
    Column(
        "retained",
        "retained",
        "%",
        "The share of the unreduced model's score that is left, as papers report it.",
        lambda row: percent(row.retained) if row.retained else "",
        lambda row: _value(row.retained),
    ),
    Column(
        "agreement",
        "same answer",
        "%",
        "How often the answer is word for word that of the unreduced model.",
        lambda row: percent(Estimate(row.method.agreement)),
        lambda row: row.method.agreement,
    ),
    Column(
        "changes",
        "lost / gained",
        "samples",
        "Samples that were right before and are wrong now, and the reverse (McNemar's exact test is in the CSV table).",
        lambda row: f"{row.changes.lost} / {row.changes.gained}" if row.changes else "",
        lambda row: float(row.changes.lost) if row.changes else None,
    ),
    Column(
        "hard",
        "hard samples",
        "%",
        "VTC-Bench's group A: the score on samples that the unreduced model gets right and a down-sampled picture "
        "of about as many tokens gets wrong. The others can be answered from a thumbnail.",
        lambda row: percent(row.hard.score) if row.hard else "",
        lambda row: row.hard.score.value if row.hard else None,
    ),
)
_COSTS = (
    Column(
        "flops",
        "prefill FLOPs",
        "LLM · all",
        "Relative to the plain model: of the language model, and with vision tower and projector.",
        lambda row: f"{ratio(row.method.prefill_flops.llm_ratio)} · {ratio(row.method.prefill_flops.total_ratio)}",
        lambda row: row.method.prefill_flops.total_ratio,
    ),
    Column(
        "kv",
        "KV cache",
        "",
        "The key-value cache after prefill, text included.",
        lambda row: size(row.method.kv_bytes),
        lambda row: row.method.kv_bytes,
    ),
    Column(
        "first_token",
        "first token",
        "ms · ratio",
        "Time to it at batch 1, the median, and its ratio to the plain model's: measured in interleaved pairs.",
        lambda row: _time(row.method.time_to_first_token),
        lambda row: _value(first_token_ratio(row)),
    ),
    Column(
        "decode",
        "next token",
        "ms · ratio",
        "The time of every further token, likewise: what a shorter cache saves.",
        lambda row: _time(row.method.decode_per_token),
        lambda row: row.method.decode_per_token.ratio.value if row.method.decode_per_token else None,
    ),
    Column(
        "bound",
        "memory-bound",
        "prefill · next",
        "Whether reading weights and cache takes longer than computing, on this machine at batch 1. "
        "Where it does, fewer tokens save nothing.",
        lambda row: " · ".join("yes" if bound else "no" for bound in _bounds(row)) or NOT_MEASURED,
        lambda row: float(sum(_bounds(row))) if _bounds(row) else None,
    ),
    Column(
        "memory",
        "peak memory",
        "",
        "The highest point while one batch is answered.",
        lambda row: size(row.method.peak_memory),
        lambda row: row.method.peak_memory,
    ),
)


def _time(times: Timed | None) -> str:
    return f"{milliseconds(times.median)} · {ratio(times.ratio.value)}" if times else NOT_MEASURED


def _bounds(row: Row) -> list[bool]:
    """True for what is memory-bound: prefill, and the next token."""
    roofline = row.method.roofline
    return [roofline.prefill.memory_bound, roofline.decode.memory_bound] if roofline else []
