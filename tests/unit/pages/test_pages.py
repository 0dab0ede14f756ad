"""Pages: whatever is put in stays text, nothing is loaded, and Chromium shows them without a word on the console."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadpo.pages.charts import MOST_POINTS, Mark, Series, bars, histogram, line_chart
from megadpo.pages.html import Html, element, escaped
from megadpo.pages.numbers import number, tick_labels, ticks
from megadpo.pages.page import LEVELS, Section, charts, facts, folded, notice, page, table
from tests.helpers.browser import Browser, needs_chromium

HOSTILE = "</script><img src=http://a.invalid/x onerror=alert(1)>\"'&\x00\ud800"


def hover(chart: Html) -> dict[str, object]:
    """What a chart tells its script."""
    found = re.search(r'data-chart="([^"]*)"', chart)
    assert found is not None
    given: dict[str, object] = json.loads(found[1].replace("&quot;", '"'))
    return given


def everything(text: str) -> str:
    """A page that has `text` wherever text can go."""
    steps = list(range(1, 200))
    values = [math.sin(step / 20) for step in steps[:-1]] + [math.nan]
    lines = [Series(text, steps, values), Series(text, steps[::20], values[::20], is_dashed=True)]
    return page(
        text,
        [
            Section(text, text, *(notice(level, text, text) for level in LEVELS), facts({text: text}), folded(text, text)),
            Section("table", table([text, *range(40)], [[text, *range(40)]], caption=text)),
            Section(
                "charts",
                charts(
                    line_chart(text, lines, x_label="step", note=text, marks=[Mark(50, text)], smooth=True),
                    histogram(text, {text: [1, 2, 2, 3], "other": [2, 9]}, "tokens", marks=[Mark(2, text)]),
                    bars(text, {text: 3, "none": 0}),
                ),
            ),
        ],
        data={text: [text, math.nan]},
        subtitle=text,
    )


def test_what_comes_from_outside_stays_text() -> None:
    document = everything(HOSTILE)
    assert "<img" not in document
    assert document.count("</script>") == 2
    assert "\ud800" not in document and "\x00" not in document
    assert escaped(Html("<b>")) == "<b>" and element("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'


def test_the_data_of_a_page_are_strict_json_again() -> None:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', everything(HOSTILE))
    assert found is not None
    [[name, values]] = json.loads(found[1]).items()
    assert name == HOSTILE and values == [HOSTILE, "nan"]


def test_a_page_asks_for_nothing() -> None:
    document = everything("a text")
    assert not re.search(r'(src|href)="(?!#|data:,)', document)
    assert "default-src 'none'" in document and "url(" not in document and "@import" not in document


def test_a_long_curve_keeps_its_single_spike() -> None:
    values = [0.0] * 100_000
    values[54_321] = 7.0
    given = hover(line_chart("loss", [Series("train", range(100_000), values)], smooth=True))
    [line] = given["series"]  # type: ignore[misc]
    assert len(line["x"]) <= MOST_POINTS + 2
    assert (54_321, 7.0) in zip(line["x"], line["y"], strict=True)


def test_what_is_not_finite_is_a_cross_and_what_is_missing_a_gap() -> None:
    chart = line_chart("loss", [Series("train", [1, 2, 3, 4, 5], [1.0, math.nan, 2.0, None, 3.0])])
    assert hover(chart)["series"][0]["y"] == [1.0, "nan", 2.0, None, 3.0]  # type: ignore[index]
    assert chart.count('class="bad"') == 1
    [way] = re.findall(r'<path d="([^"]*)" class="line', chart)
    assert way.count("M") == 3 and "L" not in way
    assert "no finite value" in line_chart("loss", [Series("train", [1], [math.inf])])


def test_a_histogram_counts_every_value_once_in_bins_of_whole_width() -> None:
    lengths = {"chosen": [5, 5, 64, 200], "rejected": [7]}
    given = hover(histogram("lengths", lengths, "tokens"))
    assert [sum(one["y"]) for one in given["series"]] == [4, 1]  # type: ignore[attr-defined]
    assert all(float(edge).is_integer() for edge in given["edges"])  # type: ignore[attr-defined]
    assert sum(hover(histogram("same", {"a": [3, 3]}, "tokens"))["series"][0]["y"]) == 2  # type: ignore[index]


def test_numbers_are_written_as_people_read_them() -> None:
    written = {12345: "12,345", 0.693147: "0.6931", 5e-7: "5e-7", 0.0: "0", math.nan: "nan", 1234.5: "1,234", 0.25: "0.25"}
    assert {value: number(value) for value in written} == written
    assert ticks(0, 1) == [0, 0.2, 0.4, pytest.approx(0.6), 0.8, 1.0]
    assert tick_labels([0, 50_000, 100_000]) == ["0", "50k", "100k"]
    assert tick_labels([0, 2e-7]) == ["0", "2e-7"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_a_page_without_a_word_on_the_console(browser: Browser, tmp_path: Path, width: int) -> None:
    file = tmp_path / "page.html"
    file.write_text(everything(HOSTILE + "x" * 200), encoding="utf-8")
    shown = browser.show(file, width)
    assert shown.console == []
    assert shown.scroll_width <= width, "the page has to be scrolled sideways"
    assert shown.small_text > 9.5


@needs_chromium
def test_a_chart_tells_the_values_under_the_pointer(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    series = [Series("train", [1, 2, 3], [0.5, 0.25, 0.125]), Series("evaluation", [2], [math.nan])]
    file.write_text(page("run", [Section("curves", charts(line_chart("loss", series)))]), encoding="utf-8")
    browser.show(file, 1280)
    browser.move_pointer_to("svg", 0.55)
    assert browser.evaluate("document.querySelector('.tip').innerText") == "step 2\ntrain: 0.25\nevaluation: nan"
    browser.move_pointer_to("h1")
    assert browser.evaluate("document.querySelector('.tip')") is None
    assert browser.console() == []


def test_the_policy_names_what_has_no_default_too() -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page("a page", []))
    for directive in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert directive in policy.split("; ")


@needs_chromium
def test_a_page_can_run_no_script_but_its_own(browser: Browser, tmp_path: Path) -> None:
    """The policy holds even where markup slips in, and the helper of these tests hears what is refused."""
    file = tmp_path / "page.html"
    slipped = Html("<script>document.title = 'run'</script><img src='http://a.invalid/x.png'>")
    file.write_text(page("a page", [Section("one", slipped)]), encoding="utf-8")
    console = browser.show(file, 390).console
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert browser.evaluate("document.title") == "a page"
