"""A real browser: Debian's Chromium, driven by Playwright."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

HANG_MS = 120_000.0
SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    # Names and addresses lead nowhere: a page that asked for one would fail, and be noticed.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def chromium() -> str:
    """The browser's program."""
    found = shutil.which("chromium")
    assert found is not None, "chromium is not installed: packages.txt names it"
    return found


@contextlib.contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=list(SWITCHES), timeout=HANG_MS
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclasses.dataclass
class Opened:
    """A page and everything that happened to it."""

    page: Page
    said: list[str] = dataclasses.field(default_factory=list)
    """What its console has, errors of the page and breaches of its policy among it."""
    requests: list[str] = dataclasses.field(default_factory=list)
    """Every address that was asked for."""


@contextlib.contextmanager
def opened(browser: Browser, file: Path, width: int, height: int = 900) -> Iterator[Opened]:
    """Open a file in a window of this size."""
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(HANG_MS)
    seen = Opened(context.new_page())
    seen.page.on("console", lambda message: seen.said.append(message.text))
    seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    try:
        seen.page.goto(file.as_uri(), wait_until="load")
        yield seen
    finally:
        context.close()
