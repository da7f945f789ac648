"""The page in a real browser: it says what the metrics say, sorts, filters, prints, and no answer can do anything."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tokenreduce.evaluation.result import Result, read_result
from tokenreduce.reporting.formatting import percent, points, signed
from tokenreduce.reporting.html import write_report

from .made_up import EVIL

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report's folder."""
    return write_report([sweep], tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="module")
def opened(written: Path) -> Iterator[tuple[Page, list[str]]]:
    """The page, opened from its file without a network, and whatever it complained about or asked for."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1280, "height": 800}).new_page()
        told: list[str] = []
        page.on("console", lambda message: told.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.on("request", lambda request: told.append(request.url) if not request.url.startswith("data:") else None)
        page.goto((written / "index.html").as_uri())
        yield page, told
        browser.close()


@pytest.fixture
def page(opened: tuple[Page, list[str]]) -> Page:
    opened[0].reload()
    return opened[0]


def results_of(sweep: Path) -> list[Result]:
    return [read_result(sweep / name) for name in ("best-0", "best-1", "othe-2", "down-3")]


def cells(page: Page, table: str, column: str) -> list[str]:
    """A column's text, row by row, as far as it is shown."""
    return [
        text.strip()
        for text in page.evaluate(
            """([table, column]) => {
                const found = document.querySelector(`[data-table="${table}"]`);
                const place = column ? found.querySelector(`[data-column="${column}"]`).cellIndex : 0;
                return [...found.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[place].innerText);
            }""",
            [table, column],
        )
    ]


def sort(page: Page, column: str) -> None:
    page.locator(f'[data-table="results"] [data-column="{column}"] button').click()


@in_a_browser
def test_it_opens_without_a_complaint_and_asks_for_nothing(page: Page, opened: tuple[Page, list[str]]) -> None:
    assert [each for each in opened[1] if not each.endswith("/index.html")] == []
    assert page.title() == "tiny on scenes"


@in_a_browser
def test_its_tables_are_the_metrics(page: Page, sweep: Path) -> None:
    shown = dict(zip(cells(page, "results", ""), cells(page, "results", "score"), strict=True))
    differences = dict(zip(cells(page, "results", ""), cells(page, "results", "unreduced"), strict=True))
    times = dict(zip(cells(page, "costs", ""), cells(page, "costs", "first_token"), strict=True))
    heat = page.locator('[data-table="categories"] tbody tr')
    for result in results_of(sweep):
        method = result.main
        name = f"{method.name} keep={method.knobs['keep']}"
        assert shown[name] == percent(method.score)
        assert differences[name] == points(method.difference_to_unreduced)
        assert times[name] == "37.9 · 0.67"
        row = heat.filter(has_text=name)
        lost = method.categories["counting"].difference_to_unreduced
        assert lost is not None
        assert [text.strip() for text in row.locator("td").all_inner_texts()] == ["", signed(lost.value)]
    assert shown["unreduced"] == "100.0 ± 2.0"
    assert len(shown) == 7


@in_a_browser
def test_no_answer_does_anything(page: Page) -> None:
    assert page.evaluate("window.harmed") is None
    assert page.locator("figcaption", has_text=EVIL).count() == 2
    assert page.locator("figcaption img, figcaption script").count() == 0


@in_a_browser
def test_a_click_on_a_heading_sorts_by_value_and_another_one_backwards(page: Page) -> None:
    sort(page, "score")
    scores = [float(text.split()[0]) for text in cells(page, "results", "score")]
    assert scores == sorted(scores, reverse=True)
    sort(page, "score")
    assert [float(text.split()[0]) for text in cells(page, "results", "score")] == sorted(scores)
    sort(page, "hard")
    hard = cells(page, "results", "hard")
    assert [bool(text) for text in hard] == sorted((bool(text) for text in hard), reverse=True)  # none is last
    page.locator('[data-table="results"] thead th').first.locator("button").click()
    names = cells(page, "results", "")
    assert names == sorted(names)


@in_a_browser
def test_methods_and_budgets_are_filtered_in_tables_figures_and_pictures(page: Page) -> None:
    page.locator(".chip", has_text="best").click()
    assert [name for name in cells(page, "results", "") if name.startswith("best")] == []
    assert [name for name in cells(page, "categories", "") if name.startswith("best")] == []
    assert page.locator("svg.chart [data-series=s0]:visible").count() == 0
    assert page.locator(".kept figure[data-series=s0]:visible").count() == 0
    page.locator("[data-reset]").click()
    page.locator("[data-budget-select]").select_option("2")
    assert cells(page, "results", "") == ["unreduced", "best keep=0.25", "random keep=36"]
    assert page.locator(".kept figure:visible").count() == 2 * page.locator(".sample").count()
    assert not page.locator(".level[data-budget='1']").first.is_visible()
    page.locator("[data-reset]").click()
    assert len(cells(page, "results", "")) == 7


@in_a_browser
def test_every_currency_has_a_tab(page: Page) -> None:
    assert page.locator(".tabs .panel:visible").count() == 1
    for tab in page.locator(".tabs > label").all():
        tab.click()
        assert page.locator(".tabs .panel:visible").count() == 1


@in_a_browser
def test_it_is_dark_where_the_system_is_until_told_otherwise(page: Page) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="dark")
    assert paper() == "rgb(16, 20, 24)"
    page.locator("[data-theme-toggle]").click()
    assert paper() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="light")


@in_a_browser
def test_nothing_is_wider_than_the_page_and_it_prints(page: Page) -> None:
    for width in (1280, 420):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1280, "height": 800})
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.locator(".tabs .panel:visible").count() == page.locator(".tabs .panel").count()
    assert not page.locator(".filters").first.is_visible()
    page.emulate_media(media="screen")


def test_the_page_holds_all_that_it_needs(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    assert EVIL not in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    assert "@import" not in text and "url(http" not in text
    assert len(re.findall(r' id="([^"]*)"', text)) == len(set(re.findall(r' id="([^"]*)"', text)))


def test_csv_is_the_metrics_to_the_last_digit(written: Path, sweep: Path) -> None:
    with (written / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file) if row["role"] == "reducer"}
    for result in results_of(sweep):
        method, row = result.main, rows[result.run.folder]
        assert method.difference_to_random is not None and method.time_to_first_token is not None
        assert float(row["score"]) == method.score.value
        assert float(row["difference_to_random_low"]) == method.difference_to_random.low
        assert float(row["first_token_seconds"]) == method.time_to_first_token.median
        assert int(row["peak_memory"]) == method.peak_memory
    with (written / "categories.csv").open(encoding="utf-8", newline="") as file:
        assert {float(row["score"]) for row in csv.DictReader(file) if row["method"] == "unreduced"} == {1.0}


def test_markdown_has_every_row_and_no_markup_of_others(written: Path, sweep: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| best keep=0\.5 \| 80\.0 ± 2\.0 \|", text)
    assert r"| other\<b\> keep=0.5 |" in text


def test_figures_are_files_too(written: Path) -> None:
    names = {path.name for path in (written / "figures").iterdir()}
    for name in ("score_tokens", "score_flops", "score_time", "ranking", "categories", "costs", "speed"):
        assert {f"{name}.png", f"{name}.svg"} <= names
    assert "<b>" not in (written / "figures" / "ranking.svg").read_text(encoding="utf-8")


def test_several_studies_are_on_one_page_and_keep_apart(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "runs")
    path = tmp_path / "runs" / "best-0" / "metrics.json"
    path.write_text(path.read_text().replace('"limit": null', '"limit": 20'))
    text = write_report([tmp_path / "runs" / name for name in ("best-0", "best-1")], tmp_path / "report").read_text()
    assert text.count("<article") == 2
    assert "<title>tiny on scenes</title>" in text
    assert len(re.findall(r' id="([^"]*)"', text)) == len(set(re.findall(r' id="([^"]*)"', text)))
    assert {"1_ranking.svg", "2_ranking.svg"} <= {each.name for each in (tmp_path / "report" / "figures").iterdir()}
