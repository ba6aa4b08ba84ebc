"""The page in a real browser."""

import pytest

from lgvit_fast.evaluation.report import page
from tests.evaluation.report.samples import make

NAME = "</script><script>document.title = 'taken'</script>"
COLUMN = "[...document.querySelectorAll('tbody tr')].map(r => +r.cells[{}].dataset.value)"


@pytest.fixture
def shown(browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(make(names=(NAME,) * 5, file=NAME, name=NAME)), "utf-8")
    browser.problems.clear()
    browser.requests.clear()

    def show(width=1000, dark=False):
        browser.show(file, width, dark)
        return browser

    yield show
    assert browser.problems == []
    assert {url for url in browser.requests if not url.startswith("data:")} == {file.as_uri()}


def test_pictures_are_drawn(shown):
    browser = shown()
    images = browser.run("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert images == [40] * 12
    charts = browser.run(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().toJSON())"
    )
    assert len(charts) == 4 and all(box["width"] > 200 and box["height"] > 100 for box in charts)
    inside = browser.run(
        "[...document.querySelectorAll('svg circle, svg rect')].every(e => {"
        " const a = e.getBoundingClientRect(), b = e.ownerSVGElement.getBoundingClientRect();"
        " return a.width > 0 && a.left >= b.left && a.right <= b.right && a.top >= b.top - 1"
        " && a.bottom <= b.bottom; })"
    )
    assert inside is True


def test_a_click_on_a_heading_sorts(shown):
    browser = shown()
    before = browser.run(COLUMN.format(3))
    assert before != sorted(before)
    browser.click("th:nth-child(4) button")
    assert browser.run(COLUMN.format(3)) == sorted(before)
    assert browser.run("document.querySelectorAll('th')[3].ariaSort") == "ascending"
    browser.click("th:nth-child(4) button")
    assert browser.run(COLUMN.format(3)) == sorted(before, reverse=True)
    browser.click("th:nth-child(1) button")
    names = browser.run("[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].innerText)")
    assert names == sorted(names, key=str.lower)
    assert browser.run("document.querySelectorAll('th[aria-sort]').length") == 1


def test_names_start_nothing(shown):
    browser = shown()
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.title") == f"Early exit or not: {NAME}"
    assert browser.run("document.querySelector('.strip .file').textContent") == "script>"


@pytest.mark.parametrize("width", [320, 400, 1200])
def test_it_fits_the_window(shown, width):
    browser = shown(width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("innerWidth") == width


def test_dark_mode(shown):
    color = "getComputedStyle(document.body).{}"
    light = [shown(dark=False).run(color.format(part)) for part in ("backgroundColor", "color")]
    dark = [shown(dark=True).run(color.format(part)) for part in ("backgroundColor", "color")]
    brightness = [[sum(map(int, c[4:-1].split(","))) for c in pair] for pair in (light, dark)]
    (paper, ink), (dark_paper, dark_ink) = brightness
    assert paper > 700 > 150 > ink and dark_paper < 150 < 600 < dark_ink


def test_the_browser_sees_what_goes_wrong(browser, tmp_path):
    file = tmp_path / "bad.html"
    file.write_text("<script>console.error('no'); missing()</script><img src=gone.png>")
    browser.problems.clear()
    browser.requests.clear()
    browser.show(file, 500)
    assert len(browser.problems) >= 3
    assert any(url.endswith("gone.png") for url in browser.requests)
