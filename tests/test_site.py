"""The documentation site: built as `make site` does, and opened in a browser."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest

import sae_lens_alloc
from tests.browser import CHROMIUM, Browser

ROOT = Path(__file__).parent.parent
WANTED = ("mkdocs", "material", "mkdocstrings_handlers", "nbconvert")
MISSING = [name for name in WANTED if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        MISSING != [],
        reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[docs]')",
    ),
]


def build(root: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(output)],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    result = build(ROOT, output)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return output


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium to open the site with")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_every_public_name_is_in_the_reference(site: Path):
    page = (site / "docs" / "api" / "index.html").read_text()
    ids = set(re.findall(r'id="sae_lens_alloc\.(\w+)"', page))
    assert ids == set(sae_lens_alloc.__all__)
    # an inherited field of SAELens' config is part of ours
    config = page.split('id="sae_lens_alloc.MutualChoiceTrainingSAEConfig"')[1]
    signature = config.split("</code></pre>")[0]
    assert "d_in" in signature and "feature_choice_steps" in signature


def test_pages_are_where_they_are_in_the_repository(site: Path):
    for page in ("", "docs/method/", "CONTRIBUTING/", "sae_lens_alloc/demo/model/"):
        assert (site / page / "index.html").exists()
    assert (site / "configs" / "gpt2_mutual_choice.yaml").exists()
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_elsewhere(site: Path):
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?(?:https?:)?//[^>]*"
        r"|<link[^>]*\shref=[\"']?(?:https?:)?//[^>]*"
    )
    for page in site.rglob("*.html"):
        assert loaded.findall(page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text())  # fmt: skip


@pytest.mark.parametrize(
    "link", ["[x](no-such-page.md)", "[x](config.md#no-such-heading)", "[x](#nowhere)"]
)
def test_a_link_that_leads_nowhere_ends_the_build(link: str, tmp_path: Path):
    for name in ("docs", "configs", "sae_lens_alloc"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "method.md").open("a") as page:
        page.write(f"\n{link}\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    assert link.strip("[x]()") in result.stderr


def test_search_finds_a_page_and_a_name_of_the_reference(
    browser: Browser, address: str
):
    browser.errors.clear()
    browser.resize(1300, 900)
    browser.visit(address)
    for words, found in (
        # without "of" and "a", which put pages of many words first
        ("fraction quota", "/docs/method/#words"),
        ("warm_start", "/docs/api/#sae_lens_alloc.warm_start"),
    ):
        browser.ask(
            "(() => { const q = document.querySelector('[data-md-component=search-query]');"
            f"q.focus(); q.value = '{words}'; q.dispatchEvent(new Event('keyup')); }})()"
        )
        browser.wait_for(
            "[...document.querySelectorAll('.md-search-result__link')]"
            f".some(a => a.pathname + a.hash === '{found}')"
        )
    assert browser.errors == []


@pytest.mark.parametrize("page", ["", "docs/api/", "docs/models/", "docs/results/"])
def test_a_narrow_screen_scrolls_in_one_direction_only(
    browser: Browser, address: str, page: str
):
    browser.resize(390, 800)
    browser.visit(address + page)
    assert browser.ask("document.documentElement.scrollWidth") <= 390


def test_lists_in_lists_are_indented_for_both_readers_of_markdown():
    """GitHub takes two spaces for a nested list, and mkdocs four."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    flat = [
        f"{page.name}: {line}"
        for page in pages
        for line in page.read_text().splitlines()
        if re.match(r" {1,3}(?:[-*]|\d+\.) ", line)
    ]
    assert flat == []
