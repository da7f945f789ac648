"""The columns of the report's tables: what each is called, means and shows, once for the page, Markdown and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.reporting.formatting import (
    NOT_MEASURED,
    count,
    measured,
    percent,
    plain,
    points,
    probability,
    quantity,
    size,
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
    return _used([_SCORE, *map(_measure, study.unreduced.figures.get("measures", {})), _LAYER_MEAN, *_QUALITY], study)


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
        lambda row: quantity(row.figures.get("measures", {}).get(name)),
        lambda row: _value(row.figures.get("measures", {}).get(name)),
    )


def raw(study: Study, row: Row) -> dict[str, Any]:
    """A row in full precision under the names of the CSV table."""
    figures, benchmark = row.figures, row.comparison.metrics["benchmark"]
    tokens, flops, times = figures["visual_tokens"], figures["prefill_flops"], figures["time_to_first_token"] or {}
    further = figures.get("decode_per_token") or {}
    return {
        "benchmark": study.benchmark,
        "model": study.model,
        "method": row.label,
        "series": row.series,
        "role": row.key,
        "settings": json.dumps(figures["knobs"]),
        "samples": benchmark["samples"],
        "images": benchmark["images"],
        **interval("score", figures["score"]),
        **interval("difference_to_unreduced", figures["difference_to_unreduced"]),
        "p_unreduced": row.p_unreduced,
        **interval("difference_to_random", figures.get("difference_to_random")),
        "p_random": row.p_random,
        **interval("retained", plain(row.retained)),
        "agreement": figures.get("agreement"),
        "lost": row.changes.lost if row.changes else None,
        "gained": row.changes.gained if row.changes else None,
        "p_mcnemar": row.changes.p_value if row.changes else None,
        **interval("hard_score", plain(row.hard.score) if row.hard else None),
        "hard_samples": row.hard.samples if row.hard else None,
        "visual_tokens": tokens["total"],
        "tokens_entering": tokens["kept"],
        "layer_mean": tokens["layer_mean"],
        "llm_flops": flops["llm"],
        "vision_flops": flops["vision"],
        "llm_flops_ratio": flops["llm_ratio"],
        "prefill_flops_ratio": flops["total_ratio"],
        "kv_bytes": figures.get("kv_bytes"),
        "first_token_seconds": times.get("median"),
        "first_token_low": times.get("low"),
        "first_token_high": times.get("high"),
        **interval("first_token_ratio", times.get("ratio")),
        **{f"first_token_{name}": spread["median"] for name, spread in times.get("parts", {}).items()},
        "next_token_seconds": further.get("median"),
        **interval("next_token_ratio", further.get("ratio")),
        "peak_memory": figures.get("peak_memory"),
        **{name: figure["value"] for name, figure in figures.get("measures", {}).items()},
        "run": row.comparison.folder.name,
    }


def first_token_ratio(row: Row) -> Mapping[str, float | None] | None:
    """The time to first token relative to the unreduced model's, measured beside it."""
    times = row.figures["time_to_first_token"]
    return times["ratio"] if times else None


def interval(name: str, estimate: Mapping[str, float | None] | None) -> dict[str, float | None]:
    """An estimate in three columns."""
    known = estimate or {}
    return {name: known.get("value"), f"{name}_low": known.get("low"), f"{name}_high": known.get("high")}


def _value(estimate: Mapping[str, float | None] | None) -> float | None:
    return estimate["value"] if estimate else None


def _share(estimate: Estimate | None) -> float | None:
    return estimate.value if estimate else None


_SCORE = Column(
    "score",
    "score",
    "%",
    "Right answers, ± half of a 95 % interval clustered by image: questions about one image are not independent.",
    lambda row: percent(row.figures["score"]),
    lambda row: row.score,
)
_ENTERING = Column(
    "entering",
    "tokens in",
    "",
    "Visual tokens that enter the language model. Merged tokens, class tokens and the like count.",
    lambda row: count(row.figures["visual_tokens"]["kept"]),
    lambda row: row.figures["visual_tokens"]["kept"],
)
_LAYER_MEAN = Column(
    "layer_mean",
    "layer mean",
    "tokens",
    "Visual tokens at the input of a decoder layer, averaged over layers: what a method inside the language model "
    "is fairly compared by.",
    lambda row: count(row.layer_mean),
    lambda row: row.layer_mean,
)
_QUALITY = (
    Column(
        "unreduced",
        "vs unreduced",
        "points",
        "The difference to the plain model on the same samples, with its paired 95 % interval. "
        "An interval around 0 means that this many samples cannot tell the two apart.",
        lambda row: points(row.figures["difference_to_unreduced"]) if row.key != "unreduced" else "",
        lambda row: _value(row.figures["difference_to_unreduced"]),
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
        lambda row: points(row.figures["difference_to_random"]) if row.figures.get("difference_to_random") else "",
        lambda row: _value(row.figures.get("difference_to_random")),
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
        lambda row: percent(plain(row.retained)) if row.retained else "",
        lambda row: _share(row.retained),
    ),
    Column(
        "agreement",
        "same answer",
        "%",
        "How often the answer is word for word that of the unreduced model.",
        lambda row: measured(row.figures.get("agreement"), ".1f", 100),
        lambda row: row.figures.get("agreement"),
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
        lambda row: percent(plain(row.hard.score)) if row.hard else "",
        lambda row: row.hard.score.value if row.hard else None,
    ),
)
_COSTS = (
    Column(
        "flops",
        "prefill FLOPs",
        "LLM · all",
        "Relative to the plain model: of the language model, and with vision tower and projector.",
        lambda row: "{llm_ratio:.2f} · {total_ratio:.2f}".format_map(row.figures["prefill_flops"]),
        lambda row: row.figures["prefill_flops"]["total_ratio"],
    ),
    Column(
        "kv",
        "KV cache",
        "",
        "The key-value cache after prefill, text included.",
        lambda row: size(row.figures.get("kv_bytes")),
        lambda row: row.figures.get("kv_bytes"),
    ),
    Column(
        "first_token",
        "first token",
        "ms · ratio",
        "Time to it at batch 1, the median, and its ratio to the plain model's: measured in interleaved pairs.",
        lambda row: _time(row.figures["time_to_first_token"]),
        lambda row: _value(first_token_ratio(row)),
    ),
    Column(
        "decode",
        "next token",
        "ms · ratio",
        "The time of every further token, likewise: what a shorter cache saves.",
        lambda row: _time(row.figures.get("decode_per_token")),
        lambda row: _value((row.figures.get("decode_per_token") or {}).get("ratio")),
    ),
    Column(
        "bound",
        "memory-bound",
        "prefill · next",
        "Whether reading weights and cache takes longer than computing, on this machine at batch 1. "
        "Where it does, fewer tokens save nothing.",
        lambda row: _bound(row),
        lambda row: None if _bound(row) == NOT_MEASURED else float(_bound(row).count("yes")),
    ),
    Column(
        "memory",
        "peak memory",
        "",
        "The highest point while one batch is answered.",
        lambda row: size(row.figures.get("peak_memory")),
        lambda row: row.figures.get("peak_memory"),
    ),
)


def _time(times: Mapping[str, Any] | None) -> str:
    return f"{1000 * times['median']:.1f} · {times['ratio']['value']:.2f}" if times else NOT_MEASURED


def _bound(row: Row) -> str:
    bounds = row.figures.get("roofline")
    if not bounds:
        return NOT_MEASURED
    return " · ".join("yes" if bounds[name]["memory_bound"] else "no" for name in ("prefill", "decode"))
