"""The final table says what the metrics say, in the width of a terminal."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace

import pytest
from rich.console import Console

from tokenreduce.evaluation.result import (
    Bound,
    BudgetResult,
    Failure,
    FirstToken,
    Limits,
    Parts,
    Result,
    Roofline,
    Spread,
)
from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.reporting.table import summary
from tokenreduce.reporting.terminal import TerminalProgress

from .made_up import estimate


def printed(compared: Result, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary(compared))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, start: str) -> str:
    return next(" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(start))


def test_every_method_has_a_row_with_all_its_figures(compared: Result) -> None:
    text = printed(compared, 120)
    assert row(text, "unreduced") == "unreduced 90.0 ± 2.0 144 / 144 0.27 0.62 37.9 0.67 600 MiB"
    assert row(text, "fopru_row") == (
        "fopru_row keep=0.25 84.0 ± 2.0 −6.0 [−8.0, −4.0] 36 / 144 0.27 0.62 37.9 0.67 600 MiB"  # noqa: RUF001
    )
    assert "35.5 / 144" in row(text, "random keep=as the reducer")
    assert "random is the mean of 5 seeds" in text
    assert "30 questions about 6 images" in text


def test_the_table_fits_a_terminal_of_100_columns(compared: Result) -> None:
    random = replace(compared.methods["random"], knobs={"keep": 36, "seeds": 5})
    compared = replace(compared, methods={**compared.methods, "random": random})
    assert "…" not in printed(compared, 100)
    assert max(map(len, printed(compared, 100).splitlines())) <= 100


def test_what_was_not_measured_is_not_made_up(compared: Result) -> None:
    reducer = replace(compared.main, time_to_first_token=None, peak_memory=None, score=Estimate(0.5))
    compared = replace(compared, methods={**compared.methods, "reducer": reducer})
    assert row(printed(compared, 120), "fopru_row").endswith("n/a n/a")
    assert "fopru_row keep=0.25 50.0 −6.0" in row(printed(compared, 120), "fopru_row")  # noqa: RUF001


def test_where_time_goes_and_why_it_is_not_less(compared: Result) -> None:
    slow, fast = Spread(0.03, 0.02, 0.04), Spread(0.0015, 0.001, 0.002)
    methods = {
        key: replace(
            method,
            time_to_first_token=FirstToken(0.0379, 0.03, 0.04, estimate(0.67), Parts(slow, fast, slow)),
            roofline=Roofline(Bound(1.0, bound, prefill), Bound(1.0, True, 0.001)),
        )
        for (key, method), prefill, bound in zip(
            compared.methods.items(), (0.001, 0.005, 0.01), (False, True, True), strict=True
        )
    }
    compared = replace(
        compared,
        methods=methods,
        machine=Limits(flops=4e10, bytes=5e9, break_even_tokens=16.2),
        budget=BudgetResult("layer_mean", 0.25, asked=36.0, expected=35.8, least=1.0, most=144.0, whole=144.0),
    )
    text = printed(compared)
    assert "fopru_row keep=0.25 36 300 KiB 30.0 1.5 30.0 5.0 5.2 0.98" in [
        " ".join(line.split()) for line in text.splitlines()
    ]
    assert "40 GFLOP/s and 5 GB/s: prefill of less than 16 tokens is memory-bound" in text
    assert "so that fewer tokens save no time: fopru_row keep=0.25, random keep=as the reducer" in text
    assert "unreduced prefill takes 30.0 times the best case: mostly overhead" in text
    assert "budget: 36 tokens, mean over layers (25 % of unreduced); the knob comes to 35.8" in text
    assert max(map(len, text.splitlines())) <= 100


def test_samples_without_an_answer_are_told(compared: Result) -> None:
    failure = Failure("test-0-3", "reducer", "image cannot be read: OSError: broken [png]")
    compared = replace(compared, benchmark=replace(compared.benchmark, errors=2, failed=[failure, failure]))
    assert (
        "left out: 2 samples without an answer, first test-0-3: image cannot be read: OSError: broken [png]"
        in printed(compared, 140)
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


def test_a_log_file_is_told_how_far_a_long_phase_is() -> None:
    file = io.StringIO()
    with TerminalProgress(Console(file=file, width=110), pause=0.01) as progress:
        progress.start("unreduced", 10, 4)
        progress.advance(2)
        for _ in range(500):
            if "left" in file.getvalue():
                break
            time.sleep(0.01)
        progress.finish()
    assert re.search(r"^unreduced: 6 of 10 after \d+ s, \S+ a second, \d+ s left$", file.getvalue(), re.MULTILINE)
