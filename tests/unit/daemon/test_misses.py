"""What is remembered of requests is bounded, and fits an answer; reasons are in integration."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkeep.daemon import misses as subject
from kvkeep.daemon.misses import Misses
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.movement.promotion import Wanted
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.model.clock import SystemClock
from kvkeep.model.ids import BlockHash, BlockKey, Namespace
from kvkeep.protocol import messages as m
from kvkeep.protocol.frames import FRAME_BYTES_MAX
from kvkeep.tiers.shared_memory import PoolFile

NAMESPACE = Namespace(b"n" * 32)
HASH = BlockHash(b"h" * 32)


@pytest.fixture
def misses(tmp_path: Path) -> Iterator[Misses]:
    """Of a daemon that no engine has come to."""
    clock = SystemClock()
    shell = Shell(PoolFile.open(tmp_path / "pool", 3 << 20), clock)
    movement = Movement(DaemonSettings(), shell, clock, lambda _name, _number: None)
    yield Misses(shell, movement, clock)
    shell.close()


def answer(misses: Misses, name: str | None) -> None:
    """A question that found nothing."""
    misses.answered(Wanted(NAMESPACE, 0, [HASH], 0.0), 0, "engine", name)


def requests(misses: Misses, part: str) -> Any:
    """What is remembered under this part of a name."""
    return misses.explain_request(part)["requests"]


def test_a_request_is_found_by_a_part_of_its_name(misses: Misses) -> None:
    """Engines add to the id that a client sees; the latest comes first."""
    for name in ("cmpl-a-0", "cmpl-b-0", "cmpl-a-1"):
        answer(misses, name)

    assert [each["engine_request"] for each in requests(misses, "cmpl-a")] == [
        "cmpl-a-1",
        "cmpl-a-0",
    ]
    assert requests(misses, "cmpl-c") == []


def test_a_pool_that_nobody_opened_is_a_reason(misses: Misses) -> None:
    """Before the first worker there is nothing to find."""
    answer(misses, "cmpl")

    assert requests(misses, "cmpl")[0]["reason"]["code"] == "no_pool"


def test_questions_without_a_name_are_not_kept(misses: Misses) -> None:
    """As those of clients that are no engines."""
    answer(misses, None)

    assert requests(misses, "") == []


def test_memory_is_bounded(misses: Misses) -> None:
    """Of requests, blocks and names only the latest are kept."""
    for number in range(2000):
        answer(misses, f"cmpl-{number}")
        block_hash = BlockHash(number.to_bytes(8, "little") * 4)
        misses.stored([BlockKey(NAMESPACE, block_hash)])
        misses.announced(Namespace(number.to_bytes(32, "little")), {})

    assert len(misses._outcomes) == subject.REQUESTS_MAX
    assert len(misses._stored) == subject.STORED_SHARE
    assert len(misses._identities) == subject.NAMESPACES_MAX


def test_the_longest_names_fit_an_answer(misses: Misses) -> None:
    """Engines that announce as much as they may: the latest are shown in words."""
    words = {f"{number}".zfill(m.NAME_MAX): "\0" * m.NAME_MAX for number in range(256)}
    for number in range(subject.NAMESPACES_MAX):
        misses.announced(Namespace(number.to_bytes(32, "little")), words)
    text = json.dumps(misses.explain_request(""))
    shown: Any = misses.explain_request("")["namespaces"]

    assert len(text) < FRAME_BYTES_MAX / 1.5
    assert shown[0]["identity"] == words
    assert shown[-1]["identity"] is None
