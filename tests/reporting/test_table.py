"""The final table says what the metrics say, in the width of a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tokenreduce.reporting.table import summary
from tokenreduce.reporting.terminal import TerminalProgress

from .made_up import estimate


def printed(metrics: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary(metrics))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, start: str) -> str:
    return next(" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(start))


def test_every_method_has_a_row_with_all_its_figures(metrics: dict[str, Any]) -> None:
    text = printed(metrics, 120)
    assert row(text, "unreduced") == "unreduced 90.0 ± 2.0 144 / 144 0.27 0.62 37.9 0.67 600 MiB"
    assert row(text, "fopru_row") == (
        "fopru_row keep=0.25 84.0 ± 2.0 −6.0 [−8.0, −4.0] 36 / 144 0.27 0.62 37.9 0.67 600 MiB"  # noqa: RUF001
    )
    assert "35.5 / 144" in row(text, "random keep=as the reducer")
    assert "random is the mean of 5 seeds" in text
    assert "30 questions about 6 images" in text


def test_the_table_fits_a_terminal_of_100_columns(metrics: dict[str, Any]) -> None:
    metrics["methods"]["random"]["knobs"]["keep"] = 36
    assert "…" not in printed(metrics, 100)
    assert max(map(len, printed(metrics, 100).splitlines())) <= 100


def test_what_was_not_measured_is_not_made_up(metrics: dict[str, Any]) -> None:
    metrics["methods"]["reducer"].update(time_to_first_token=None, peak_memory=None)
    metrics["methods"]["reducer"]["score"] = {"value": 0.5, "low": None, "high": None}
    assert row(printed(metrics, 120), "fopru_row").endswith("n/a n/a")
    assert "fopru_row keep=0.25 50.0 −6.0" in row(printed(metrics, 120), "fopru_row")  # noqa: RUF001


def test_where_time_goes_and_why_it_is_not_less(metrics: dict[str, Any]) -> None:
    for method, prefill, bound in zip(
        metrics["methods"].values(), (0.001, 0.005, 0.01), (False, True, True), strict=True
    ):
        times = {"median": 0.03, "low": 0.02, "high": 0.04}
        method.update(
            kv_bytes=300 << 10,
            decode_per_token={"median": 0.0052, "low": 0.005, "high": 0.006, "ratio": estimate(0.98)},
            roofline={"prefill": {"seconds": prefill, "memory_bound": bound}},
        )
        method["time_to_first_token"]["parts"] = {"vision": times, "selection": {"median": 0.0015}, "llm": times}
    metrics["machine"] = {"flops": 4e10, "bytes": 5e9, "break_even_tokens": 16.2}
    metrics["budget"] = {"currency": "layer_mean", "asked": 36.0, "whole": 144.0, "expected": 35.8}
    text = printed(metrics)
    assert "fopru_row keep=0.25 36 300 KiB 30.0 1.5 30.0 5.0 5.2 0.98" in [
        " ".join(line.split()) for line in text.splitlines()
    ]
    assert "40 GFLOP/s and 5 GB/s: prefill of less than 16 tokens is memory-bound" in text
    assert "so that fewer tokens save no time: fopru_row keep=0.25, random keep=as the reducer" in text
    assert "unreduced prefill takes 30.0 times the best case: mostly overhead" in text
    assert "budget: 36 tokens, mean over layers (25 % of unreduced); the knob comes to 35.8" in text
    assert max(map(len, text.splitlines())) <= 100


def test_samples_without_an_answer_are_told(metrics: dict[str, Any]) -> None:
    failure = {"id": "test-0-3", "method": "reducer", "error": "image cannot be read: OSError: broken [png]"}
    metrics["benchmark"].update(errors=2, failed=[failure, failure])
    assert (
        "left out: 2 samples without an answer, first test-0-3: image cannot be read: OSError: broken [png]"
        in printed(metrics, 140)
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_phases_counts_and_what_was_done_before(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=110)
    with TerminalProgress(console) as progress:
        progress.start("unreduced", 10, 4)
        progress.advance(6)
        progress.finish()
        progress.note("waiting for [another] job")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "unreduced" in text
    assert "4 from an earlier run" in text
    assert "waiting for [another] job" in text
    assert ("10/10" if terminal else "10 of 10 done") in text
    assert terminal == ("\x1b" in text)
