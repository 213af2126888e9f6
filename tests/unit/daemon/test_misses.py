"""What is remembered of requests is bounded, and fits an answer; reasons are in integration."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvkeep.core.breaker import BreakerState
from kvkeep.daemon import misses as subject
from kvkeep.daemon.misses import Misses, Reason
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.movement.promotion import Wanted
from kvkeep.daemon.movement.proving import Proof
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


def reason_above(*tiers: object, wanted: Wanted | None = None, **movement: object) -> Reason:
    """Why a block is missing that no pool has, above tiers such as these."""
    known = {"tiers": tiers, "closed_tiers": {}, "opening_tiers": [], "pace": None} | movement
    ledger = SimpleNamespace(find=lambda _key: None)
    shell: Any = SimpleNamespace(node=SimpleNamespace(ledger=ledger))
    misses = Misses(shell, cast(Any, SimpleNamespace(**known)), SystemClock())
    return misses.reason(BlockKey(NAMESPACE, HASH), wanted)


def tier_that(**states: object) -> Any:
    """A tier that has every block and answers, but for what is said."""
    breaker = states.pop("breaker", BreakerState.CLOSED)
    usual = {"name": "disk", "is_asked": True, "proof": Proof.DONE, "is_held": False}
    queue = SimpleNamespace(breaker_state=breaker)
    return SimpleNamespace(queue=queue, has=lambda _key: True, **(usual | states))


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ({"breaker": BreakerState.OPEN}, "disk does not answer now"),
        ({"breaker": BreakerState.HALF_OPEN}, "disk does not answer now"),
        ({"is_asked": False}, "disk does not answer now"),
        ({"proof": Proof.AWAITED}, "disk has not answered yet"),
        ({"is_held": True}, "disk is just being cleared"),
    ],
)
def test_a_tier_that_is_not_read_is_away(states: dict[str, object], words: str) -> None:
    """What it had says nothing of what can be had; another that has the block comes first."""
    away = reason_above(tier_that(**states))
    beside = reason_above(tier_that(**states), tier_that(name="other"))

    assert away.code == "tier_away"
    assert words in away.text
    assert beside.code == "in_tier"
    assert "in other" in beside.text


def test_the_reason_of_a_plan_is_that_requests() -> None:
    """What the planner said last may have been about somebody else's."""
    wanted = Wanted(NAMESPACE, 0, [HASH], 0.0)
    said: dict[str, Any] = {"plan_reason": "loading costs more"}
    declined = SimpleNamespace(may_pay=lambda *_: False)
    agreed = SimpleNamespace(may_pay=lambda *_: True)

    assert "costs more" in reason_above(tier_that(), wanted=wanted, pace=declined, **said).text
    assert "costs more" not in reason_above(tier_that(), wanted=wanted, pace=agreed, **said).text
    assert "costs more" not in reason_above(tier_that(), pace=declined, **said).text


def test_tiers_that_can_t_be_asked_are_named() -> None:
    """The block may lie in one that is opening or failed, whatever the daemon remembers."""
    found = reason_above(closed_tiers={"s3": "no bucket"}, opening_tiers=["s3", "valkey"])

    assert found.code == "never_stored"
    assert "s3 can't be used (no bucket), and may have it" in found.text
    assert "valkey is just being opened" in found.text


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
