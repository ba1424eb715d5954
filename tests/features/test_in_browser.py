"""The page in a browser: search, order, open, by mouse and by keyboard, wide and narrow, light and dark."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_lens_alloc.evaluation.snippets import TokenTexts
from sae_lens_alloc.features.lens import LogitLens
from sae_lens_alloc.features.page import FeaturePage
from tests.browser import CHROMIUM, Browser
from tests.features.conftest import DEAD, N_FEATURES

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open it with")

NUMBERS = "[...document.querySelectorAll('.feature .number')].map(e => +e.textContent)"
NAME = "document.getElementById('feature-name')?.textContent"
FOUND = "document.getElementById('found').textContent"


@pytest.fixture(scope="module")
def file(page: FeaturePage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(path)
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, file: Path) -> Iterator[Browser]:
    """The page in a wide window. At the end nothing was said on the console."""
    chromium.errors.clear()
    chromium.resize(1300, 800)
    chromium.open(file)
    chromium.wait_for("document.querySelectorAll('.feature').length > 0")
    yield chromium
    assert chromium.errors == []


def by_firings(page: FeaturePage) -> list[int]:
    firings = page.figures.firings.tolist()
    return sorted(range(N_FEATURES), key=lambda i: (-firings[i], i))


def choose(browser: Browser, order: str):
    browser.ask(
        f"(() => {{ const s = document.getElementById('sort'); s.value = '{order}';"
        "s.dispatchEvent(new Event('change')); })()"
    )


def test_features_are_listed_in_the_order_chosen(browser: Browser, page: FeaturePage):
    drawn = browser.ask(NUMBERS)
    assert 10 < len(drawn) < N_FEATURES  # those that can be seen, and a few more
    assert drawn == by_firings(page)[: len(drawn)]
    assert isinstance(page.lens, LogitLens)
    effects = torch.maximum(
        page.lens.largest_effects[:, 0], -page.lens.smallest_effects[:, 0]
    )
    for order, values in {
        "largest": page.figures.largest,
        "effect": effects,
        "norm": page.norms,
        "number": -torch.arange(N_FEATURES),
    }.items():
        choose(browser, order)
        expected = values.argsort(descending=True, stable=True).tolist()
        assert browser.ask(NUMBERS) == expected[: len(drawn)], order
    browser.click("#reverse")
    assert browser.ask(NUMBERS)[:3] == [149, 148, 147]


def test_far_rows_are_drawn_when_they_come_into_sight(
    browser: Browser, page: FeaturePage
):
    browser.ask("document.getElementById('rows').scrollTop = 1e6")
    last = by_firings(page)[-1]
    browser.wait_for(f"{NUMBERS}.includes({last})")
    assert len(browser.ask(NUMBERS)) < N_FEATURES


def test_dead_features_are_found_and_say_so(browser: Browser, page: FeaturePage):
    n_dead = int((page.figures.firings == 0).sum())
    browser.click("#filter label:nth-of-type(4)")
    assert browser.ask(FOUND) == f"{n_dead} of {N_FEATURES} features"
    assert browser.ask(NUMBERS)[0] == DEAD[0]
    browser.click(".feature")
    browser.wait_for(f"{NAME} === 'Feature {DEAD[0]}dead'")
    detail = browser.ask("document.getElementById('detail').innerText")
    assert "active on no token of this text" in detail
    assert "Largest activations" not in detail and "null" not in detail
    browser.click("#filter label:nth-of-type(2)")
    assert browser.ask(FOUND) == f"{N_FEATURES - n_dead} of {N_FEATURES} features"


def test_search_by_number_by_range_and_by_token(browser: Browser, page: FeaturePage):
    def search(text: str) -> list[int]:
        browser.ask("document.getElementById('search').select()")
        browser.type(text)
        return browser.ask(NUMBERS)

    browser.press("/")
    assert search("42") == [42]
    assert sorted(search("10-14")) == [10, 11, 12, 13, 14]
    assert isinstance(page.lens, LogitLens)
    texts = TokenTexts(page.tokenizer)
    peaks = [_first_three(page, feature) for feature in range(N_FEATURES)]
    promoted = [list(map(texts.of_token, row)) for row in page.lens.largest.tolist()]
    for word in (peaks[0][0], promoted[N_FEATURES - 1][0]):
        word = word.strip().lower()
        assert len(word) > 1
        expected = {
            feature
            for feature in range(N_FEATURES)
            for text in peaks[feature] + promoted[feature]
            if word in text.lower()
        }
        assert 0 < len(expected) < 20  # all are drawn
        assert set(search(word.upper())) == expected
        # each row shows what was found in it
        rows = browser.ask(
            "[...document.querySelectorAll('.feature .peaks')].map(e => e.innerText)"
        )
        assert all(word in row.lower() for row in rows)
    assert search("no such token") == []
    assert "No feature matches." in browser.ask("document.body.innerText")


def _first_three(page: FeaturePage, feature: int) -> list[str]:
    """The first three different tokens of a feature's largest activations."""
    of_feature = (page.examples.features == feature) & (page.examples.bands == 0)
    tokens = page.activity.tokens.flatten()[page.examples.tokens[of_feature]].tolist()
    texts = map(TokenTexts(page.tokenizer).of_token, tokens)
    return list(dict.fromkeys(texts))[:3]


def test_an_opened_feature_shows_what_was_measured(browser: Browser, page: FeaturePage):
    feature = by_firings(page)[3]
    browser.click(".feature:nth-of-type(4)")
    browser.wait_for(f"{NAME} === 'Feature {feature}'")
    assert browser.ask("location.hash") == f"#f{feature}"
    detail = browser.ask("document.getElementById('detail').innerText")
    firings = int(page.figures.firings[feature])
    assert f"{firings:,} of {page.activity.n_tokens:,} tokens" in detail
    for title in ("Largest activations", "Upper quarter", "Lowest quarter"):
        assert title in detail
    of_feature = page.examples.features == feature
    assert browser.ask("document.querySelectorAll('.example').length") == int(
        of_feature.sum()
    )
    # each example marks its token, and the largest activation has the full colour
    peaks = browser.ask(
        "[...document.querySelectorAll('.example .peak')].map(e => e.style.getPropertyValue('--a'))"
    )
    assert len(peaks) == int(of_feature.sum()) and peaks[0] == "1.000"
    bars = "document.querySelectorAll('.histogram i').length"
    assert browser.ask(bars) == page.figures.histogram.shape[1]
    # lens and neighbours
    assert browser.ask("document.querySelectorAll('.bars li').length") == 20
    near = browser.ask("[...document.querySelectorAll('.near a')].map(a => a.hash)")
    expected = page.by_decoder.features[feature].tolist()
    expected += [f for f in page.by_activity.features[feature].tolist() if f >= 0]
    assert near == [f"#f{other}" for other in expected]
    browser.click(".near a")
    browser.wait_for(f"{NAME}.startsWith('Feature {expected[0]}')")
    browser.ask("history.back()")
    browser.wait_for(f"{NAME} === 'Feature {feature}'")


def test_an_example_opens_to_its_whole_context(browser: Browser):
    text = "document.querySelector('.example .text').textContent"
    before = browser.ask(text)
    browser.click(".example .more")
    after = browser.ask(text)
    assert len(after) > len(before) and "<|endoftext|>" in after
    assert browser.ask("document.activeElement.className") == "more"
    browser.press("Enter")
    assert browser.ask(text) == before


def test_by_keyboard_alone(browser: Browser, page: FeaturePage):
    order = by_firings(page)
    browser.press("/")
    assert browser.ask("document.activeElement.id") == "search"
    browser.press("ArrowDown", "ArrowDown", "ArrowDown")
    # the focus can be seen
    assert browser.ask("document.activeElement.id") == "rows"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.ask(outline) == "solid"
    browser.press("Enter")
    browser.wait_for(f"{NAME} === 'Feature {order[2]}'")
    assert browser.ask("document.activeElement.id") == "feature-name"
    # on to the next one by its link
    browser.press("Tab", "Tab")
    assert browser.ask("document.activeElement.textContent") == "→"
    assert browser.ask(outline) == "solid"
    browser.press("Enter")
    browser.wait_for(f"{NAME} === 'Feature {order[3]}'")
    browser.press("Escape")
    browser.wait_for("document.activeElement.id === 'rows'")
    browser.press("End", "Enter")
    browser.wait_for(f"{NAME}.startsWith('Feature {order[-1]}')")
    browser.press("Escape")
    browser.wait_for("document.activeElement.id === 'rows'")
    browser.press("Home", "Enter")
    browser.wait_for(f"{NAME} === 'Feature {order[0]}'")
    browser.press("/")
    browser.wait_for("document.activeElement.id === 'search'")


def test_text_shows_the_features_of_each_token(browser: Browser, page: FeaturePage):
    browser.click("nav a[data-view=text]")
    browser.wait_for("document.querySelectorAll('.snippet span').length > 0")
    snippets = page.snippets
    n = sum(len(snippet.tokens) for snippet in snippets)
    assert browser.ask("document.querySelectorAll('.snippet span').length") == n
    shown = browser.ask("document.querySelector('.snippet').textContent")
    assert shown == "".join(snippets[0].tokens)
    browser.click(".snippet span:nth-of-type(5)")
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    token = snippets[0].context * page.activity.length + snippets[0].start + 5
    active = page.activity.pairs.to_dense()[token].argsort(descending=True)
    active = [f for f in active.tolist() if page.activity.pairs.to_dense()[token, f]]
    listed = browser.ask(
        "[...document.querySelectorAll('#token .number')].map(e => +e.textContent)"
    )
    assert listed == active
    assert f"{len(active)} features" in browser.ask(
        "document.getElementById('token').innerText"
    )
    browser.click("#token .near a")
    browser.wait_for(f"{NAME} === 'Feature {active[0]}'")


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_narrow_screen(
    browser: Browser, page: FeaturePage, file: Path, dark: bool
):
    browser.resize(400, 800, dark)
    browser.open(file)
    browser.wait_for("document.querySelectorAll('.feature').length > 0")
    visible = "getComputedStyle(document.querySelector('{}')).display !== 'none'"
    width = "document.documentElement.scrollWidth"
    assert browser.ask(visible.format(".list"))
    assert not browser.ask(visible.format(".detail"))
    assert browser.ask(width) == 400
    browser.click(".feature:nth-of-type(2)")
    browser.wait_for(f"{NAME} === 'Feature {by_firings(page)[1]}'")
    assert not browser.ask(visible.format(".list"))
    assert browser.ask(visible.format(".detail"))
    assert browser.ask(width) == 400
    browser.click(".back")
    browser.wait_for(visible.format(".list"))
    browser.click("nav a[data-view=text]")
    browser.wait_for("document.querySelectorAll('.snippet span').length > 0")
    assert browser.ask(width) == 400


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance as WCAG 2 defines it, from 0 to 1."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in colour[:3])
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_colour(browser: Browser, file: Path, dark: bool):
    browser.resize(1300, 800, dark)
    browser.open(file)
    browser.wait_for("document.querySelectorAll('.peak').length > 0")

    def style(selector: str, name: str) -> tuple[float, ...]:
        value = browser.ask(
            f"getComputedStyle(document.querySelector('{selector}')).{name}"
        )
        return tuple(map(float, re.findall(r"[\d.]+", value)))

    paper = style(".list", "backgroundColor")
    ink, muted = style("body", "color"), style(".example .value", "color")
    *heat, alpha = style(".peak", "backgroundColor")
    strongest = tuple(
        alpha * h + (1 - alpha) * p for h, p in zip(heat, paper, strict=True)
    )
    page_colour = style("body", "backgroundColor")
    for text, background in (
        (ink, paper),
        (muted, paper),
        (muted, page_colour),
        (ink, strongest),
        (style(".near a", "color"), paper),
    ):
        assert contrast(text, background) >= 4.5, (text, background)
    assert (luminance(paper) < 0.1) == dark


def test_data_that_cannot_be_read_is_said(chromium: Browser, file: Path):
    damaged = file.with_name("damaged.html")
    text = file.read_text()
    damaged.write_text(re.sub(r"(octet-stream\">).{40}", r"\1", text))
    chromium.open(damaged)
    chromium.wait_for("!document.getElementById('failure').hidden")
    chromium.errors.clear()
