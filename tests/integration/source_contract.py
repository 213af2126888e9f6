"""What every source of block events keeps, whatever carries them."""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from kvkeep.router.events.following import Follower
from kvkeep.router.prefix_hashes import token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex
from kvkeep.testing.tcp_proxy import FaultyRelay
from tests.waiting import until

BLOCK_TOKENS = 4
NAME = "engine"
FIRST, SECOND, THIRD = ([n] * BLOCK_TOKENS for n in (1, 2, 3))


class Rig(Protocol):
    """A publisher that counts, and a way to it that breaks."""

    relay: FaultyRelay

    async def publish(self, *events: dict[str, Any]) -> None:
        """Tell of events."""
        ...

    async def publish_bytes(self, payload: bytes) -> None:
        """Tell what may be nonsense."""
        ...

    def lose(self) -> None:
        """Let a message be lost for good: its number is used, and nobody has it."""
        ...

    def restart(self) -> None:
        """Be another engine at the same place, whose numbers begin anew."""
        ...

    def followed(self) -> AbstractAsyncContextManager[tuple[Follower, PrefixIndex]]:
        """A source that follows it, connected."""
        ...


def stored(tokens: list[int], name: int, parent: int | None = None) -> dict[str, Any]:
    """As vLLM says it."""
    return {
        "type": "BlockStored",
        "block_hashes": [name],
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": BLOCK_TOKENS,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "ownership": "some field of a later version",
    }


def removed(name: int) -> dict[str, Any]:
    """As vLLM says it."""
    return {"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU"}


def held(index: PrefixIndex, *blocks: list[int]) -> int:
    """Leading ones of these blocks that the engine is known to hold."""
    tokens = [token for block in blocks for token in block]
    return index.match(token_hashes(tokens, BLOCK_TOKENS, token_root()), [NAME])[0]


class SourceContract:
    """Subclassed with a fixture ``rig``."""

    async def test_what_is_told_is_known(self, rig: Rig) -> None:
        """Blocks are known with what they follow, and gone when they are removed or cleared."""
        async with rig.followed() as (_, index):
            await rig.publish(stored(FIRST, 11), stored(SECOND, 12, parent=11))
            await until(lambda: held(index, FIRST, SECOND, THIRD) == 2)
            await rig.publish(removed(12))
            await until(lambda: held(index, FIRST, SECOND) == 1)
            await rig.publish({"type": "AllBlocksCleared"})
            await until(lambda: held(index, FIRST) == 0)

    async def test_what_was_told_before_is_asked_for(self, rig: Rig) -> None:
        """Who comes later knows what the engine holds already."""
        await rig.publish(stored(FIRST, 11))
        async with rig.followed() as (_, index):
            await until(lambda: held(index, FIRST) == 1)

    async def test_what_is_lost_for_good_forgets_the_engine(self, rig: Rig) -> None:
        """Where news can't be had again what was known may be wrong; what comes later is not."""
        async with rig.followed() as (source, index):
            await rig.publish(stored(FIRST, 11))
            await until(lambda: held(index, FIRST) == 1)
            dropped = source.counters.num_dropped
            rig.lose()
            await rig.publish(stored(SECOND, 22))
            await until(lambda: held(index, SECOND) == 1)

            assert held(index, FIRST) == 0
            assert source.counters.num_dropped == dropped + 1

    async def test_another_engine_is_known_anew(self, rig: Rig) -> None:
        """Numbers that begin again mean an empty cache."""
        async with rig.followed() as (_, index):
            for _ in range(5):
                await rig.publish(stored(FIRST, 11))
            await until(lambda: held(index, FIRST) == 1)
            rig.restart()
            await rig.publish(stored(SECOND, 22))
            await until(lambda: held(index, SECOND) == 1)

            assert held(index, FIRST) == 0

    async def test_a_cut_costs_nothing_but_time(self, rig: Rig) -> None:
        """What was told while the connection was gone is asked for, and what was known stays."""
        from kvkeep.testing.tcp_proxy import NetworkFault

        async with rig.followed() as (source, index):
            await rig.publish(stored(FIRST, 11))
            await until(lambda: held(index, FIRST) == 1)
            dropped = source.counters.num_dropped
            rig.relay.strike(NetworkFault.REFUSED)
            await until(lambda: not source.is_connected)
            await rig.publish(stored(SECOND, 12, parent=11))
            rig.relay.heal()
            await until(lambda: held(index, FIRST, SECOND) == 2)

            assert source.counters.num_dropped == dropped
            assert source.counters.num_losses == 1

    async def test_nonsense_is_refused_and_survived(self, rig: Rig) -> None:
        """Wrong bytes forget the engine, are counted, and the next good event is understood."""
        async with rig.followed() as (source, index):
            await rig.publish(stored(FIRST, 11))
            await until(lambda: held(index, FIRST) == 1)
            for payload in (b"", b"\xc1", b"\x93\x01\x02", b"\x91" * 5000):
                await rig.publish_bytes(payload)
            await rig.publish(stored(SECOND, 22))
            await until(lambda: held(index, SECOND) == 1)

            assert held(index, FIRST) == 0
            assert source.counters.num_refused == 4
            index.check()
