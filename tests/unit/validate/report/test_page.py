"""The page holds everything, needs nothing, and executes nothing of what it shows."""

from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvkeep.validate.report.form import FORM, convert_report
from kvkeep.validate.report.page import FAILED_SHOWN_MAX, REQUESTS_SHOWN_MAX, page, write_page

Written = Callable[..., Awaitable[dict[str, Any]]]

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "<iframe src='http://example.com'></iframe>",
    "javascript:alert(1)",
    "<!-- --><base href=//example.com>",
    "]]><script>",
    "\x00\x1b[31m\ud800",
)


class Seen(HTMLParser):
    """Elements, attributes and texts, as a browser would take them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def hostile_report(text: str) -> dict[str, Any]:
    """A report in which everything that is not ours says this."""
    answer = {"text": text, "tokens": [text], "ttft_s": 0.1, "total_s": 0.2, "prompt_tokens": 9}
    request = {
        "phase": text, "prompt_id": text, "verdict": "corruption", "kind": text, "reason": text,
        "position": 1, "reference_top2": [[text, -1.0]], "candidate_top2": [[text, -1.0]],
        "reference": {**answer, "ttft_s": 0.3}, "candidate": answer,
    }  # fmt: skip
    run = {
        "schema": text, "suite": text, "outcome": text, "passed": False, "mode": text,
        "run_id": text, "sampling": {"max_tokens": text}, "settings": {text: text},
        "subject": {"url": text, "capabilities": {"model": text, "block_tokens": text}},
        "suspects": [
            {"prompt_id": text, "phase": text, "sentence": text,
             "tallies": [{"arm": text, "blocks": text, "asked": 3, "differed": 2}]},
        ],
        "phases": [
            {"name": text, "counters": {"engine": {"vllm:prefix_cache_queries": 5.0}}},
        ],
        "checks": [{"name": text, "ok": False, "detail": text}],
        "requests": [request, {**request, "candidate": {"error": text}}],
    }  # fmt: skip
    return {"schema": FORM, "passed": False, "runs": [run]}


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_was_said_becomes_markup(text: str) -> None:
    """Whatever a model or server says, the page has only its own elements and attributes."""
    harmless = Seen(page(convert_report(hostile_report("x"))))
    seen = Seen(page(convert_report(hostile_report(text))))

    assert seen.tags == harmless.tags
    assert [name for name, _ in seen.attributes] == [name for name, _ in harmless.attributes]
    assert not {"script", "iframe", "img", "base", "object", "embed"} & set(seen.tags)


async def test_the_page_needs_nothing_but_itself(written: Written) -> None:
    """No address but that of an empty icon, and a policy that would stop any other."""
    seen = Seen(page(convert_report(await written())))

    leading = ("href", "src", "action", "xlink:href")
    links = [value for name, value in seen.attributes if name in leading]
    assert links == ["data:,"]
    policy = next(value for name, value in seen.attributes if "default-src" in value)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert "@import" not in "".join(seen.texts)
    assert "url(" not in "".join(seen.texts)


async def test_the_page_shows_every_part(written: Written) -> None:
    """All plots, all checks, and for a failure both answers."""
    text = page(convert_report(await written(flip_every=2)))

    for heading in (
        "Time to the first token",
        "Time to the last byte",
        "Asked again",
        "First token by prompt length",
        "Served share by tier",
        "Verdicts in the order of asking",
        "Requests that did not pass",
        "reset emptied the engine",
    ):
        assert heading in text
    assert "reference: The code word is" in text
    assert text.count("<svg") == text.count("</svg>") == 2 * 5


def test_a_run_without_a_request_has_a_page() -> None:
    """A run that ended early says that there is nothing to plot."""
    run = {"schema": "x/1", "suite": "x", "outcome": "failed", "passed": False}

    report = convert_report({"schema": FORM, "passed": False, "runs": [run]})

    assert "nothing to plot" in page(report)


def test_what_a_suite_measured_is_shown_number_by_number() -> None:
    """Also what lies in a group of numbers."""
    run = {"schema": "x/1", "suite": "x", "outcome": "passed", "passed": True,
           "numbers": {"ratio": 0.81414, "pairs": {"both": 12}}}  # fmt: skip

    texts = Seen(page(convert_report({"schema": FORM, "passed": True, "runs": [run]}))).texts

    assert texts[texts.index("ratio") + 1] == "0.814"
    assert texts[texts.index("pairs, both") + 1] == "12"


def test_many_requests_leave_the_page_short() -> None:
    """The page names how many more there are; the JSON report has them."""
    report = hostile_report("x")
    report["runs"][0]["requests"] *= 2000

    text = page(convert_report(report))

    assert f"and {4000 - FAILED_SHOWN_MAX} more in the JSON report" in text
    assert f"the first {REQUESTS_SHOWN_MAX}" in text
    assert len(text) < 3_000_000


def test_the_file_is_whole(tmp_path: Path) -> None:
    """What is written is UTF-8, whatever the report held, and nothing else is left."""
    path = tmp_path / "a" / "page.html"

    write_page(convert_report(hostile_report("\ud800ä")), path)

    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert list(path.parent.iterdir()) == [path]
