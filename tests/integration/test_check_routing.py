"""``kvkeep check routing`` and ``generation`` against kvkeep's own router before fake engines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvkeep.cli.check import check
from kvkeep.validate.settings import ENVIRONMENT
from kvkeep.validate.suites import routing
from tests.integration.routers import engines, router


@pytest.fixture(autouse=True)
def few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell even from uneven, and no setting of the person who runs the tests."""
    monkeypatch.setattr(routing, "NUM_KEYS", {"small": 300, "full": 300})
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def engine_urls() -> Iterator[list[str]]:
    with engines(3) as urls:
        yield urls


def checked(suite: str, urls: list[str], policy: str, path: Path) -> tuple[int, dict[str, Any]]:
    """Exit code, and the run in the report."""
    # Names of their own: an engine's name says where on the ring it lies, and ports are drawn anew.
    named = [{"name": f"engine-{index}", "url": url} for index, url in enumerate(urls)]
    with router(urls, {"policy": policy, "engines": named}) as process:
        addresses = ["--url", urls[0], "--router-url", process.ready["url"]]
        addresses += ["--router-admin", process.ready["admin_url"]]
        result = CliRunner().invoke(check, [suite, *addresses, "--json", str(path), "--quiet"])
    (run,) = json.loads(path.read_text())["runs"]
    return result.exit_code, run


def test_a_ring_of_engines_passes(engine_urls: list[str], tmp_path: Path) -> None:
    """Keys have homes, and a drained engine's keys alone move, and come back."""
    code, run = checked("routing", engine_urls, "consistent_hash", tmp_path / "r.json")

    assert (code, run["outcome"]) == (0, "passed"), run["checks"]
    assert 0 < run["numbers"]["moved_keys"] < 200


def test_a_router_without_keys_proves_nothing(engine_urls: list[str], tmp_path: Path) -> None:
    """In turn is a policy, too, but not one by which a key has a home."""
    code, run = checked("routing", engine_urls, "round_robin", tmp_path / "r.json")

    assert code == 1
    assert run["outcome"] == "not-exercised", run["checks"]


def test_generation_through_the_router(engine_urls: list[str], tmp_path: Path) -> None:
    """Streams, whole answers and errors pass through as an engine gives them."""
    code, run = checked("generation", engine_urls, "round_robin", tmp_path / "r.json")

    assert (code, run["outcome"]) == (0, "passed"), run["checks"]
