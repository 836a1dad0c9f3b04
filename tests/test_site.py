"""The site of docs/: built without a warning, and opened in a browser."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from playwright.sync_api import Browser
from zensical.main import cli

import xgblora
from test_html_report import browser

__all__ = ["browser"]  # a fixture

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = [
    page for section in CONFIG["nav"] for entries in section.values() for entry in entries for page in entry.values()
]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the site, built strictly: a warning is an error."""
    built = CliRunner().invoke(cli, ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")])
    assert built.exit_code == 0, built.output
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(ROOT / CONFIG["site_dir"])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_page_is_in_the_menu() -> None:
    assert sorted(PAGES) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))


def test_the_reference_has_all_that_is_public() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert sorted(line.removeprefix("::: xgblora.") for line in text.splitlines() if line.startswith(":::")) == sorted(
        xgblora.__all__
    )


def test_pages_open_without_a_complaint(site: str, browser: Browser) -> None:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda line: complaints.append(f"{line.type}: {line.text}") if line.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", lambda answer: complaints.append(answer.url) if answer.status >= 400 else None)
    strange: list[str] = []
    page.on(
        "request",
        lambda request: None if request.url.startswith((site, "data:", "blob:")) else strange.append(request.url),
    )
    for name in ("index", "how_it_works", "reference"):
        page.goto(f"{site}/{name}.html")
        assert page.inner_text("h1").strip()
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.locator("#xgblora\\.Trainer").count() == 1
    assert (complaints, strange) == ([], [])
    page.close()
