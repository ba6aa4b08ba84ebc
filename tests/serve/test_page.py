"""The page in a real browser, with a real server behind it."""

import json
import shutil

import pytest

from tests.deploy import exports
from tests.serve.server import picture, serving

HOSTILE = "<img src=x onerror=alert(1)>"
LIMITS = ("--max-images", "4", "--queue", "3", "--max-upload-mb", "1", "--top-k", "3")
CARDS = """[...document.querySelectorAll('.card')].map(card => ({
  name: card.querySelector('.head .quiet').textContent,
  title: card.querySelector('h3').textContent,
  error: card.querySelector('.failure')?.textContent ?? null,
  left: card.querySelector('.left')?.textContent,
  top: [...card.querySelectorAll('.top li')].map(row => row.textContent),
  taken: [...card.querySelectorAll('.mark')].map(mark => mark.classList.contains('taken')),
  passed: card.querySelectorAll('.block.passed').length,
  about: card.querySelector('svg')?.getAttribute('aria-label'),
}))"""
COUNTS = """[...document.querySelectorAll('#numbers tr')].map(
  row => [2, 3].map(column => Number(row.cells[column].textContent)))"""
SETTLED = "document.querySelectorAll('.card:not([aria-busy])').length === {}"


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """Its class names are no markup, whatever they look like."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    shutil.copytree(exports.folder(), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["class_names"] = [f"{HOSTILE} {number}" for number in range(7)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with serving(folder, *LIMITS) as made:
        yield made


@pytest.fixture
def page(browser, server):
    """The page; whatever happens on it, nothing but the server is asked."""
    browser.problems.clear()
    browser.requests.clear()
    browser.show(server.url, 1000)
    browser.wait("document.querySelector('#facts dd')")
    yield browser
    asked = {url for url in browser.requests if not url.startswith(("data:", "blob:"))}
    assert f"{server.url}/page.js" in asked
    assert all(url.startswith(f"{server.url}/") for url in asked)


def files(folder, *contents, name="{}.png"):
    found = [folder / name.format(number) for number in range(len(contents))]
    for path, content in zip(found, contents, strict=True):
        path.write_bytes(content)
    return found


def test_pictures_are_answered_each_on_its_own(page, server, tmp_path):
    data = [picture(1), b"no picture", picture(7)]
    want = [server.predict(data[0]).json(), None, server.predict(data[2]).json()]
    before = server.client.get("/stats").json()["exits"]
    page.choose("#files", *files(tmp_path, *data, name=HOSTILE + " {}.png"))
    page.wait(SETTLED.format(3))
    page.wait("String([...document.images].map(image => image.naturalWidth)) === '40,0,40'")
    cards = page.run(CARDS)
    assert [card["name"] for card in cards] == [f"{HOSTILE} {number}.png" for number in range(3)]
    assert cards[1]["error"] == "not a readable image: cut short, or no image"
    assert cards[1]["title"] == "No answer" and cards[1]["taken"] == []
    kinds = ["local head", "local head", "global head", "global head"]
    after = list(before)
    for card, answer in zip(cards, want, strict=True):
        if answer is None:
            continue
        exit, layer = answer["exit_index"], answer["exit_layer"]
        what = "final classifier" if exit == 4 else f"exit {exit + 1}, {kinds[exit]}"
        assert card["title"] == answer["label"] and HOSTILE in card["title"]
        assert card["left"] == f"Left after block {layer} of 5: {what}"
        assert card["taken"] == [place == exit for place in range(5)]
        assert card["passed"] == layer and f"blocks 1 to {layer} of 5" in card["about"]
        share = f"{100 * answer['confidence']:.1f}"
        assert len(card["top"]) == 3 and share in card["top"][0]
        assert card["error"] is None
        after[exit] += 1
    mine = [now - then for now, then in zip(after, before, strict=True)]
    counts = ",".join(f"{own},{total}" for own, total in zip(mine, after, strict=True))
    page.wait(f"String({COUNTS}) === '{counts}'")
    bars = page.run(
        "[...document.querySelectorAll('#chart rect.mine')].map(bar => bar.getBBox().height)"
    )
    assert [height > 0 for height in bars] == [bool(number) for number in mine]
    status = page.run("document.querySelector('#status').textContent")
    assert status.startswith("2 pictures answered, 1 without an answer, ")
    facts = page.run("document.querySelector('#facts').textContent")
    assert "Entropy(threshold=0.7)" in facts and "none: nothing is claimed" in facts
    assert page.problems == []  # of the console, and violations of the page's policy
    page.click("#clear")
    assert page.run(CARDS) == []
    page.wait(f"{COUNTS}.every(row => row[0] === 0)")


def test_many_pictures_go_in_parts_that_the_server_takes(page, server, tmp_path):
    """Four are a request's limit, and three the queue's: the server is busy until fewer are sent."""
    data = [picture(seed) for seed in range(6)]
    data.insert(2, bytes(2**20))
    page.choose("#files", *files(tmp_path, *data))
    page.wait(SETTLED.format(7))
    errors = [card["error"] for card in page.run(CARDS)]
    assert errors[2] == "larger than the 1 MiB that the server takes"
    assert errors[:2] + errors[3:] == [None] * 6
    page.wait(f"{COUNTS}.reduce((total, row) => total + row[0], 0) === 6")
    assert page.problems and all("429" in problem for problem in page.problems)
    page.problems.clear()


def test_a_server_that_is_gone_is_said_of_every_picture(page, server, tmp_path):
    page.offline(True)
    try:
        page.choose("#files", *files(tmp_path, picture(1), picture(2)))
        page.wait(SETTLED.format(2))
    finally:
        page.offline(False)
    assert {card["error"] for card in page.run(CARDS)} == {"the server cannot be reached"}
    page.choose("#files", *files(tmp_path, picture(3)))
    page.wait(SETTLED.format(3))
    assert page.run(CARDS)[0]["error"] is None


def test_without_the_counts_of_the_server_its_own_are_shown(page, server, tmp_path):
    page.block("*/stats")
    try:
        page.show(server.url, 1000)
        page.choose("#files", *files(tmp_path, picture(1)))
        page.wait(f"{COUNTS}.some(row => row[0] === 1)")
        assert {row[1] for row in page.run(COUNTS)} == {None}
    finally:
        page.block()
    assert all("/stats" in problem for problem in page.problems)


@pytest.mark.parametrize("width", [320, 360, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_the_window(browser, page, server, width, dark, tmp_path):
    browser.show(server.url, width, dark)
    browser.wait("document.querySelector('#facts dd')")
    browser.choose(
        "#files", *files(tmp_path, picture(1), b"no picture", name="long" * 30 + "{}.png")
    )
    browser.wait(SETTLED.format(2))
    assert browser.run("document.documentElement.scrollWidth") <= width
    colors = "['backgroundColor', 'color'].map(part => getComputedStyle(document.body)[part])"
    paper, ink = [sum(map(int, color[4:-1].split(","))) for color in browser.run(colors)]
    assert (paper < 150 < 600 < ink) if dark else (paper > 700 > 150 > ink)


def test_the_keyboard_is_enough(page, tmp_path):
    reached = []
    page.choose("#files", *files(tmp_path, picture(1)))
    page.wait(SETTLED.format(1))
    for _ in range(3):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id || document.activeElement.localName"))
    assert reached == ["files", "summary", "clear"]
    outline = "getComputedStyle(document.querySelector('#clear')).outlineStyle"
    assert page.run(outline) == "solid"
