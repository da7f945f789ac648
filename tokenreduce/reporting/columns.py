"""The columns of the report's tables: what each is called, means and shows, said once for the page, Markdown and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.reporting.study import Row, Study
from tokenreduce.reporting.wording import count, measured, percent, plain, points, probability, size


@dataclass(frozen=True)
class Column:
    """One column: what it is called and means, how a row is written in it, and the number that it is sorted by."""

    name: str
    title: str
    unit: str
    meaning: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | None]
    higher_is_better: bool | None = True


def columns(study: Study) -> list[Column]:
    """Those that at least one row of the study has something in."""
    return [each for each in _COLUMNS if any(each.value(row) is not None for row in study.rows)]


def raw(study: Study, row: Row) -> dict[str, Any]:
    """A row in full precision under the names of the CSV table."""
    figures, benchmark = row.figures, row.comparison.metrics["benchmark"]
    tokens, flops, times = figures["visual_tokens"], figures["prefill_flops"], figures["time_to_first_token"] or {}
    return {
        "benchmark": study.benchmark,
        "model": study.model,
        "method": row.label,
        "series": row.series,
        "role": row.key,
        "settings": json.dumps(figures["knobs"]),
        "samples": benchmark["samples"],
        "images": benchmark["images"],
        **_interval("score", figures["score"]),
        **_interval("difference_to_unreduced", figures["difference_to_unreduced"]),
        "p_unreduced": row.p_unreduced,
        **_interval("difference_to_random", figures.get("difference_to_random")),
        "p_random": row.p_random,
        **_interval("retained", plain(row.retained)),
        "agreement": figures.get("agreement"),
        "lost": row.changes.lost if row.changes else None,
        "gained": row.changes.gained if row.changes else None,
        "p_mcnemar": row.changes.p_value if row.changes else None,
        **_interval("hard_score", plain(row.hard.score) if row.hard else None),
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
        **_interval("first_token_ratio", times.get("ratio")),
        "peak_memory": figures.get("peak_memory"),
        "run": row.comparison.folder.name,
    }


def first_token_ratio(row: Row) -> Mapping[str, float | None] | None:
    """The time to first token relative to the unreduced model's, measured beside it."""
    times = row.figures["time_to_first_token"]
    return times["ratio"] if times else None


def _interval(name: str, estimate: Mapping[str, float | None] | None) -> dict[str, float | None]:
    known = estimate or {}
    return {name: known.get("value"), f"{name}_low": known.get("low"), f"{name}_high": known.get("high")}


def _value(estimate: Mapping[str, float | None] | None) -> float | None:
    return estimate["value"] if estimate else None


def _share(estimate: Estimate | None) -> float | None:
    return estimate.value if estimate else None


_COLUMNS = (
    Column(
        "score",
        "score",
        "%",
        "Right answers, ± half of a 95 % interval clustered by image: questions about one image are not independent.",
        lambda row: percent(row.figures["score"]),
        lambda row: row.score,
    ),
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
        None,
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
        None,
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
        "Samples that were right before and are wrong now, and the reverse (with McNemar's exact test in the CSV table).",
        lambda row: f"{row.changes.lost} / {row.changes.gained}" if row.changes else "",
        lambda row: float(row.changes.lost) if row.changes else None,
        False,
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
    Column(
        "entering",
        "tokens in",
        "",
        "Visual tokens that enter the language model. Merged tokens, class tokens and the like count.",
        lambda row: count(row.figures["visual_tokens"]["kept"]),
        lambda row: row.figures["visual_tokens"]["kept"],
        False,
    ),
    Column(
        "layer_mean",
        "layer mean",
        "tokens",
        "Visual tokens at the input of a decoder layer, averaged over layers: what a method inside the language model "
        "is fairly compared by.",
        lambda row: count(row.layer_mean),
        lambda row: row.layer_mean,
        False,
    ),
    Column(
        "flops",
        "prefill FLOPs",
        "LLM · all",
        "Relative to the plain model: of the language model, and with vision tower and projector.",
        lambda row: "{llm_ratio:.2f} · {total_ratio:.2f}".format_map(row.figures["prefill_flops"]),
        lambda row: row.figures["prefill_flops"]["total_ratio"],
        False,
    ),
    Column(
        "kv",
        "KV cache",
        "",
        "The key-value cache after prefill, text included.",
        lambda row: size(row.figures.get("kv_bytes")),
        lambda row: row.figures.get("kv_bytes"),
        False,
    ),
    Column(
        "first_token",
        "first token",
        "ms · ratio",
        "Time to it at batch 1, the median, and its ratio to the plain model's: measured in interleaved pairs.",
        lambda row: _first_token(row),
        lambda row: _value(first_token_ratio(row)),
        False,
    ),
    Column(
        "memory",
        "peak memory",
        "",
        "The highest point while one batch is answered.",
        lambda row: size(row.figures.get("peak_memory")),
        lambda row: row.figures.get("peak_memory"),
        False,
    ),
)


def _first_token(row: Row) -> str:
    times = row.figures["time_to_first_token"]
    return f"{1000 * times['median']:.1f} · {times['ratio']['value']:.2f}" if times else measured(None, "")
