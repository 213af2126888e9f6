"""A daemon whose tiers break: no wrong byte, no question that hangs, and service afterwards.

The servers are real, and so is the daemon. A question is late if the second answer has not come in
the time that the first one announced and the client's patience; ``Site.serve`` fails then.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvkeep.cli.main import main
from kvkeep.client.prefixes import Answer, PrefixLease
from kvkeep.model.ids import BlockHash, Namespace
from kvkeep.testing.tcp_proxy import NetworkFault, Towards
from tests.fault.media import (
    BACK_TIMEOUT_S,
    CONFIG,
    PATIENT,
    S3_ENVIRONMENT,
    Medium,
    Site,
    attached,
    opened_medium,
    running_site,
)
from tests.integration.daemons import (
    CALL_TIMEOUT_S,
    LAYOUT,
    NAMESPACE,
    hashes_of,
    opened_prefixes,
    payload_of,
    wait_until,
)

HASHES = hashes_of(0, 48)
OTHERS = hashes_of(1000, 48)
MID_BYTES = 10 * LAYOUT.block_bytes + LAYOUT.block_bytes // 2
"""In the middle of a value, in the middle of a prefix."""
SLOW_BYTES_PER_S = 2 << 20
"""The prefix takes 0.2 s then, more than ten times what it takes otherwise."""
IN_A_FIRST_VALUE_BYTES = 2048
"""Of answers: behind eight short ones to writes, in the first value that is read."""
SERVERS = ["valkey", "object_store", "mooncake"]


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    """The medium that the test names."""
    with opened_medium(request.param, tmp_path) as medium:
        yield medium


@pytest.fixture
def site(medium: Medium, tmp_path: Path) -> Iterator[Site]:
    """A daemon above it that has cascaded one prefix and served it from there."""
    with running_site(medium, tmp_path) as site:
        site.cascade(HASHES)
        site.wait_for_service(HASHES)
        yield site


@pytest.mark.parametrize("medium", SERVERS, indirect=True)
def test_a_server_that_is_killed_and_comes_back_empty(medium: Medium, site: Site) -> None:
    """Misses while it is away; everything is kept and served again when it is back."""
    assert medium.server is not None
    medium.server.kill()
    site.ask_while_broken(HASHES, OTHERS)
    medium.restart()

    site.wait_for_service(HASHES)


@pytest.mark.parametrize("medium", SERVERS, indirect=True)
def test_a_server_that_stands_still(medium: Medium, site: Site) -> None:
    """The same, and what it kept is still there."""
    assert medium.server is not None
    medium.server.freeze()
    try:
        site.ask_while_broken(HASHES, OTHERS)
    finally:
        medium.server.thaw()

    site.wait_for_service(HASHES)


@pytest.mark.parametrize(
    ("fault", "towards"),
    [
        (NetworkFault.CUT, Towards.CLIENT),
        (NetworkFault.CUT, Towards.SERVER),
        (NetworkFault.FROZEN, Towards.CLIENT),
        (NetworkFault.SLOW, Towards.CLIENT),
    ],
)
@pytest.mark.parametrize("medium", ["valkey", "object_store"], indirect=True)
def test_a_network_that_breaks_in_mid_value(
    medium: Medium, site: Site, fault: NetworkFault, towards: Towards
) -> None:
    """Part of a value is never taken for it, nor a wait for an end."""
    assert medium.relay is not None
    site.clear_pool()
    struck = medium.relay.strike(
        fault, towards=towards, after_bytes=MID_BYTES, bytes_per_s=SLOW_BYTES_PER_S
    )
    site.serve(HASHES)
    site.ask_while_broken(HASHES, OTHERS)
    assert struck.wait(CALL_TIMEOUT_S)
    medium.relay.heal()

    site.wait_for_service(HASHES)


# --- Before a tier serves -------------------------------------------------------------------------


def tier_status(site: Site) -> dict[str, object]:
    """What the daemon says of its tier; nothing if it has none."""
    tiers: list[dict[str, object]] = site.daemon.status()["movement"]["tiers"]
    return tiers[0] if tiers else {}


def told_by_doctor(site: Site, config: Path) -> str:
    """What ``kvkeep doctor`` prints of the daemon's tiers."""
    environment = {"KVKEEP_SOCKET": site.daemon.socket}
    return CliRunner().invoke(main, ["doctor", "--config", str(config)], env=environment).stdout


@pytest.mark.parametrize("medium", ["valkey", "object_store"], indirect=True)
def test_a_server_that_is_away_at_first_is_proven_when_it_answers(
    medium: Medium, tmp_path: Path
) -> None:
    """Nothing is taken from it before; then what was stored meanwhile goes there too."""
    assert medium.server is not None
    medium.server.kill()
    with running_site(medium, tmp_path) as site:
        assert tier_status(site)["proof"] == "awaited"
        site.worker.store(HASHES)
        said = told_by_doctor(site, tmp_path / CONFIG)
        assert "not used before it has given bytes back" in said or "left alone" in said
        medium.restart()
        wait_until(lambda: tier_status(site)["proof"] == "done", "proven", BACK_TIMEOUT_S)
        wait_until(
            lambda: site.daemon.counter("blocks_cascaded") >= len(HASHES),
            "what was stored meanwhile is there",
            BACK_TIMEOUT_S,
        )
        site.wait_for_service(HASHES)


@pytest.mark.parametrize("medium", ["valkey"], indirect=True)
def test_a_server_that_first_answers_with_other_bytes_is_switched_off(
    medium: Medium, tmp_path: Path
) -> None:
    """Named and counted; the daemon serves from its pool."""
    assert medium.relay is not None
    medium.relay.strike(NetworkFault.REFUSED)
    with running_site(medium, tmp_path) as site:
        assert tier_status(site)["proof"] == "awaited"
        flipped = medium.relay.strike(NetworkFault.BIT_FLIP, after_bytes=IN_A_FIRST_VALUE_BYTES)
        wait_until(lambda: not tier_status(site), "switched off", BACK_TIMEOUT_S)

        assert flipped.is_set()
        failed = site.daemon.status()["movement"]["failed"]
        assert "gave back other bytes than it was given" in failed["valkey"]
        assert site.daemon.counter("tier_proofs_failed") == 1
        assert "gave back other bytes" in told_by_doctor(site, tmp_path / CONFIG)
        site.worker.store(HASHES)
        assert site.serve(HASHES) == len(HASHES)


# --- What is on the disk --------------------------------------------------------------------------


def places_of(segment: Path, hashes: Sequence[BlockHash]) -> list[int]:
    """Where the bytes of blocks begin in a segment."""
    data = segment.read_bytes()
    found = [data.find(payload_of(block_hash).tobytes()) for block_hash in hashes]
    assert min(found) >= 0
    return found


def overwrite(segment: Path, place: int, data: bytes) -> None:
    """Change bytes behind everybody's back."""
    with segment.open("r+b") as file:
        file.seek(place)
        file.write(data)


@pytest.mark.parametrize("damage", ["bit flip", "zeros", "swap", "cut short"])
@pytest.mark.parametrize("medium", [PATIENT + "disk"], indirect=True)
def test_damaged_values_on_the_disk_are_computed_again(
    site: Site, tmp_path: Path, damage: str
) -> None:
    """The prefix ends before the first of them; stored again, it is served whole."""
    (segment,) = (tmp_path / "disk").glob("segment-*")
    places = places_of(segment, HASHES)
    # Where the file is to end, its last value is the one that others outlive.
    victim = places.index(max(places)) if damage == "cut short" else 10
    one, two = places[victim], places[11]
    first, second = (payload_of(HASHES[idx]).tobytes() for idx in (victim, 11))
    if damage == "bit flip":
        overwrite(segment, one + 77, bytes([first[77] ^ 4]))
    elif damage == "zeros":
        overwrite(segment, one + len(first) // 2, bytes(len(first) // 2))
    elif damage == "cut short":
        os.truncate(segment, one + len(first) // 2)
    else:
        overwrite(segment, one, second)
        overwrite(segment, two, first)
    site.settle()
    site.clear_pool()
    assert site.serve(HASHES) == victim

    site.wait_for_service(HASHES)


# --- Who asks, and what happens meanwhile ---------------------------------------------------------


@contextlib.contextmanager
def reading_stopped(medium: Medium, site: Site) -> Iterator[None]:
    """The pool is empty, and the next read stops in the middle until the end."""
    assert medium.relay is not None
    site.settle()
    site.clear_pool()
    medium.relay.strike(NetworkFault.FROZEN, after_bytes=MID_BYTES)
    try:
        yield
    finally:
        medium.relay.heal()


def wait_for_reads(site: Site) -> None:
    """Wait until slots are being filled from below."""

    def is_reading() -> bool:
        return site.daemon.gauge("write_leases") == 2

    wait_until(is_reading, "a promotion is under way")


@pytest.mark.parametrize("medium", [PATIENT + "valkey"], indirect=True)
def test_askers_who_leave_or_forget_cost_the_others_nothing(medium: Medium, site: Site) -> None:
    """Sessions end and questions are forgotten while blocks are on their way: nothing stays."""
    before = site.daemon.counter("blocks_promoted")
    with reading_stopped(medium, site):
        with opened_prefixes(site.daemon) as leaving:
            assert all(leaving.ask(NAMESPACE, 0, HASHES) for _ in range(4))
            forgotten = site.client.ask(NAMESPACE, 0, HASHES)
            kept = site.client.ask(NAMESPACE, 0, HASHES)
            assert forgotten is not None
            assert kept is not None
            wait_for_reads(site)
        site.client.forget(forgotten)
    answer = site.client.answer(kept, CALL_TIMEOUT_S)
    assert isinstance(answer, PrefixLease)
    site.client.release([answer])
    # The forgotten answer may come behind the other one, and is given back when it is read.
    assert site.serve(HASHES) == len(HASHES)
    site.settle()

    assert site.daemon.counter("blocks_promoted") == before + len(HASHES)
    assert site.client.num_late == 0


@pytest.mark.parametrize("medium", [PATIENT + "valkey"], indirect=True)
def test_a_clear_while_blocks_are_on_their_way(medium: Medium, site: Site) -> None:
    """What arrives afterwards is not lent, and its slots are free; the next read is whole."""
    with reading_stopped(medium, site):
        question = site.client.ask(NAMESPACE, 0, HASHES)
        assert question is not None
        wait_for_reads(site)
        site.clear_pool()
    answer = site.client.answer(question, CALL_TIMEOUT_S)
    if isinstance(answer, PrefixLease):
        site.client.release([answer])

    site.wait_for_service(HASHES)


@pytest.mark.parametrize("is_polite", [True, False])
@pytest.mark.parametrize("medium", [PATIENT + "valkey"], indirect=True)
def test_a_daemon_that_ends_while_blocks_are_on_their_way(
    medium: Medium, site: Site, is_polite: bool
) -> None:
    """Politely in a bounded time with code 0; either way the next one serves right bytes only."""
    daemon = site.daemon
    with reading_stopped(medium, site):
        assert site.client.ask(NAMESPACE, 0, HASHES) is not None
        wait_for_reads(site)
        if is_polite:
            assert daemon.stop() == 0
        else:
            daemon.kill()
    daemon.start()
    with attached(daemon) as again:
        assert daemon.gauge("slots_fenced") == 0
        again.serve(HASHES)
        again.wait_for_service(HASHES)


# --- Tenants --------------------------------------------------------------------------------------

OTHER_TENANT = Namespace(b"m" * 32)


@pytest.mark.parametrize("medium", [PATIENT + kind for kind in ("disk", *SERVERS)], indirect=True)
def test_tenants_do_not_meet_in_any_tier(medium: Medium, site: Site) -> None:
    """The same hashes under another namespace: nothing in the pool, nothing below it."""
    for is_in_pool in (True, False):
        if not is_in_pool:
            site.settle()
            site.clear_pool()
        question = site.client.ask(OTHER_TENANT, 0, HASHES)
        assert question is not None
        assert site.client.answer(question, CALL_TIMEOUT_S) is Answer.NOTHING

    assert site.serve(HASHES) == len(HASHES)
