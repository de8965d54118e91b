"""A real browser for the tests of the console: Debian's Chromium, driven by Playwright.

Every page that a test opens is watched: an error in its script, a message in the browser's console and a request to
another host fail the test.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.running import until

PAGES = ("flow", "learning", "experts", "versions", "letters", "try_it")
TITLES = ("Flow", "Learning", "Experts", "Versions", "Dead letters", "Try it")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. Without it the test is skipped; under continuous integration it fails."""
    program = shutil.which("chromium-headless-shell")
    if program is None:
        reason = "no browser: install chromium-headless-shell of Debian"
        if os.environ.get("CI"):
            pytest.fail(f"with CI set this is a failure: {reason}", pytrace=False)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # As root, which containers often are, Chromium needs --no-sandbox; it only opens our own pages.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """One tab in a browser profile of its own.

    Attributes:
        page: Playwright's page.
        expected: Patterns of messages that the test expects.

    Args:
        browser: Of :func:`chromium`.
        address: The console's, with or without ``#token=``.
        width: Of the window, pixels.
    """

    def __init__(self, browser: Browser, address: str, width: int = 1280) -> None:
        self._base = address.partition("#")[0].rstrip("/")
        self._host = urlsplit(address).netloc
        self._context = browser.new_context(viewport={"width": width, "height": 900})
        self.page: Page = self._context.new_page()
        self.expected: list[str] = []
        self._messages: list[str] = []
        self.page.on("console", lambda message: self._messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self._messages.append(f"error in a script: {error}"))
        self.page.on("request", lambda request: self._note_host(request.url))
        self.page.goto(address)

    def _note_host(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self._host:
            self._messages.append(f"a request to another host: {url}")

    def open(self, name: str) -> None:
        """Open a page of the console, and wait until it shows its heading and has looked once."""
        with self.opening(name):
            self.page.evaluate("name => { location.hash = '#/' + name }", name)

    @contextmanager
    def opening(self, name: str) -> Iterator[None]:
        """What is done within opens a page; afterwards the page shows its heading and has looked once."""
        if self.page.url.endswith(f"#/{name}"):
            yield
            return
        with self.page.expect_response(lambda response: f"/api/{name}" in response.url, timeout=20_000) as answer:
            yield
        answer.value.finished()
        title = TITLES[PAGES.index(name)]
        self.page.locator("h1", has_text=re.compile(f"^{title}$")).wait_for(timeout=20_000)
        self.page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")

    def figures(self) -> dict[str, str]:
        """Every figure that the page shows: name → exact value."""
        shown: dict[str, str] = self.page.evaluate(
            "() => Object.fromEntries([...document.querySelectorAll('[data-figure]')]"
            ".map(each => [each.dataset.figure, each.dataset.value ?? each.textContent]))"
        )
        return shown

    def wait_for(self, name: str, value: object) -> None:
        """Wait until a figure has this value."""
        until(lambda: self.figures().get(name) == str(value), f"{name} = {value}, not {self.figures().get(name)!r}", 30)

    def text(self) -> str:
        """What the page shows, as text."""
        return str(self.page.inner_text("body"))

    def wait_for_text(self, text: str) -> None:
        """Wait until the page shows this text."""
        until(lambda: text in self.text(), f"{text!r} on the page", 30)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def focused(self) -> str:
        """The text, or else the name, of what has the focus."""
        return str(
            self.page.evaluate(
                "() => { const e = document.activeElement;"
                " return (e.innerText || e.getAttribute('aria-label') || e.name || e.id || e.tagName).trim() }"
            )
        )

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.page.evaluate("() => document.documentElement.scrollWidth - innerWidth"))

    def close(self) -> None:
        """Close the tab.

        Raises:
            AssertionError: Something was wrong that the test did not expect.
        """
        self._context.close()
        wrong = [each for each in self._messages if not any(re.search(known, each) for known in self.expected)]
        assert not wrong, wrong


@contextmanager
def tab(browser: Browser, address: str, width: int = 1280) -> Iterator[Tab]:
    """A tab, closed at the end; see :meth:`Tab.close`."""
    opened = Tab(browser, address, width)
    yield opened
    opened.close()


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """A report's figures by their dotted names: ``events.trained``."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        name: each
        for key, below in values.items()
        for name, each in flat(below, f"{prefix}.{key}" if prefix else key).items()
    }


def shows(text: str, value: Any) -> bool:
    """Whether what a page shows as an exact value is this one."""
    if value is None or text == "":
        return value is None and text == ""
    return float(text) == value if isinstance(value, int | float) else text == str(value)


def picture(tab: Tab, path: Path) -> None:
    """A picture of the whole page."""
    tab.page.screenshot(path=str(path), full_page=True)
