"""The HTML report in a real browser: plots are drawn, nothing runs, nothing is fetched."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from playwright.sync_api import Browser

from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import FakeStore, Faults
from kvkeep.testing.fake_transport import fake_transport
from kvkeep.validate import load, runner
from kvkeep.validate.arms import Means, compare_arms, standard_arms
from kvkeep.validate.capability import probe
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.prompts import documents, load_words
from kvkeep.validate.report.form import FORM, convert_report
from kvkeep.validate.report.page import write_page
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.subject import Subject
from kvkeep.validate.suites.determinism import Determinism, make_plan
from tests.servers.browser import Opened, opened, running_browser

pytestmark = pytest.mark.slow

HOSTILE = "</pre></style></title><script>window.hacked = 1</script><img src=x onerror='hacked = 2'>"
WIDTHS = (1280, 400)
TEXT_PIXELS_MIN = 9.5
"""Smaller writing in a plot can't be read on a telephone."""
PLOTS_OF_RUN = 5

FIND_SMALLEST_TEXT = """() => Math.min(...[...document.querySelectorAll('svg text')].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a))"""
FIND_OUTSIDE = """() => [...document.querySelectorAll('svg.plot')].flatMap(plot => {
    const frame = plot.closest('figure').getBoundingClientRect();
    return [...plot.querySelectorAll('text, rect, circle, polyline')].filter(mark => {
        const place = mark.getBoundingClientRect();
        return place.left < frame.left || place.right > frame.right
            || place.top < frame.top || place.bottom > frame.bottom;
    }).map(mark => mark.outerHTML.slice(0, 80));
})"""
FIND_UNPAINTED = """() => [...document.querySelectorAll('svg .line, svg .dot, svg .bar, svg .cell')]
    .filter(mark => {
        const style = getComputedStyle(mark);
        const paint = mark.classList.contains('line') ? style.stroke : style.fill;
        return !paint.startsWith('rgb') || mark.getBoundingClientRect().width === 0;
    }).map(mark => mark.outerHTML.slice(0, 80))"""


async def _written() -> dict[str, Any]:
    """A run that fails in part, and a comparison of arms, with answers that try to break out."""
    engine = FakeEngine(store=FakeStore(), faults=Faults(flip_every=9))
    transport = fake_transport(engine)
    async with Endpoint("http://fake", transport=transport) as endpoint:
        subject = Subject(endpoint, await probe(endpoint), endpoint)
        settings = CheckSettings(max_iterations=10)
        plan = make_plan(settings, load_words(), 60)
        suite = Determinism(subject, settings, plan, Sampling(8), exact=False, run_id="r")
        means = Means(endpoint, endpoint)
        arms = standard_arms(["cold", "cached", "reset"], means, run_id="s")
        prompts = [document.prompt() for document in documents(6, 80)]
        compared = await compare_arms(arms, prompts, Sampling(4), block_tokens=16, exact=True)
        runs = [(await suite.run()).to_dict(), compared.to_dict()]
    return {"schema": FORM, "passed": False, "runs": json.loads(json.dumps(runs))}


def _set_times(told: Any, chance: Random) -> None:
    """Have every answer take as long in each run of this test: plots then show the same."""
    if isinstance(told, list):
        for each in told:
            _set_times(each, chance)
    elif isinstance(told, dict):
        if told.get("total_s") is not None:
            told["ttft_s"] = chance.expovariate(20.0) + 0.001
            told["total_s"] = told["ttft_s"] * chance.uniform(1.5, 9.0)
        for each in told.values():
            _set_times(each, chance)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a report with failures and hostile answers."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "SETTLE_PAUSE_S", 0.0)
        patched.setattr(load, "RESET_PAUSE_S", 0.0)
        report = asyncio.run(_written())
    _set_times(report, Random(5))
    for request in report["runs"][0]["requests"]:
        request["candidate"]["text"] += HOSTILE
        request["prompt_id"] += HOSTILE
    report["runs"][0]["checks"].append({"name": HOSTILE, "ok": False, "detail": HOSTILE})
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(convert_report(report), path)
    return path


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Browser]:
    """One for all tests of this file; after the page, which is made on an event loop of its own."""
    with running_browser() as running:
        yield running


@pytest.fixture(params=WIDTHS)
def seen(page: Path, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """The page, at the width of a screen and of a telephone."""
    with opened(browser, page, request.param) as found:
        yield found


def test_every_plot_is_drawn(seen: Opened) -> None:
    """Each has a size, and its marks have a color and lie inside its frame."""
    plots = seen.page.locator("svg.plot")

    assert plots.count() == 2 * PLOTS_OF_RUN
    for number in range(plots.count()):
        box = plots.nth(number).bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 20
    assert seen.page.evaluate(FIND_UNPAINTED) == []
    assert seen.page.evaluate(FIND_OUTSIDE) == []
    for kind in ("line", "dot", "bar", "cell"):
        assert seen.page.locator(f"svg .{kind}").count() > 1


def test_a_plot_alone_is_no_larger_than_among_others(
    page: Path, browser: Browser, tmp_path: Path
) -> None:
    """Its writing has the size of the page's."""
    request = {"phase": "p", "prompt_id": "q", "verdict": "identical"}
    run = {
        "schema": "x/1",
        "suite": "x",
        "outcome": "passed",
        "passed": True,
        "requests": [request],
    }
    path = tmp_path / "one.html"
    write_page(convert_report({"schema": FORM, "passed": True, "runs": [run]}), path)

    with opened(browser, path, 1280) as found:
        box = found.page.locator("svg.plot").bounding_box()
        assert box is not None
        assert box["width"] < 640


def test_it_can_be_read_at_this_width(seen: Opened) -> None:
    """Nothing has to be scrolled sideways, and no writing is too small."""
    widths = seen.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")

    assert widths[0] <= widths[1]
    assert seen.page.evaluate(FIND_SMALLEST_TEXT) >= TEXT_PIXELS_MIN


def test_nothing_is_fetched_and_nothing_complains(seen: Opened) -> None:
    """The file itself is all that is asked for, and the console is empty."""
    assert seen.requests == [seen.page.url]
    assert seen.said == []


def test_what_a_model_said_is_text(seen: Opened) -> None:
    """It stands on the page as it was said, and did not run."""
    assert seen.page.evaluate("typeof window.hacked") == "undefined"
    assert seen.page.locator("script, img").count() == 0
    assert HOSTILE in (seen.page.locator("pre").nth(1).text_content() or "")


def test_a_policy_stands_behind_the_escaping(page: Path, browser: Browser, tmp_path: Path) -> None:
    """Even markup that got into the page could neither run nor fetch."""
    broken = tmp_path / "broken.html"
    markup = "<script>window.hacked = 1</script><img src='http://127.0.0.1:9/x'></body>"
    broken.write_text(page.read_text().replace("</body>", markup))

    with opened(browser, broken, 1280) as found:
        assert found.page.evaluate("typeof window.hacked") == "undefined"
        assert any("Content Security Policy" in line for line in found.said)
