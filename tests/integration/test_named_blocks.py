"""What an engine says of its stored blocks, in vLLM's bytes, is what a router makes of prompts."""

from types import SimpleNamespace

import msgspec
import pytest

from kvkeep.model.announced import POOL_MEDIUM, number_of
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import HASH_BYTES, Namespace
from kvkeep.router.events.block_events import BlockStored, decode_batch
from kvkeep.router.prefix_hashes import salt_key, token_hashes, token_root
from kvkeep.router.prefix_index import PrefixIndex

BLOCK_TOKENS = 4
TOKENS = list(range(100, 112))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("salt", [None, "tenant"])
@pytest.mark.parametrize("lora", [None, "adapter"])
def test_names_arrive_at_the_router(salt: str | None, lora: str | None) -> None:
    """With its salt and its adapter a prompt is found in the pool, and without them it is not."""
    kv_events = pytest.importorskip("vllm.distributed.kv_events")
    from kvkeep.connector import compat
    from kvkeep.connector.scheduler.block_names import BlockNames

    adapter = None if lora is None else SimpleNamespace(lora_name=lora)
    request = SimpleNamespace(all_token_ids=TOKENS, cache_salt=salt, lora_request=adapter)
    hashes = BlockHasher(Namespace(b"n" * HASH_BYTES), BLOCK_TOKENS).extend(TOKENS)
    names = BlockNames(BLOCK_TOKENS)
    names.tell(request, hashes[:1])
    names.tell(request, hashes)
    events = [compat.block_named(named, BLOCK_TOKENS) for named in names.take()]
    payload = msgspec.msgpack.encode(kv_events.KVEventBatch(ts=1.0, events=events))
    index = PrefixIndex(BLOCK_TOKENS)
    index.pools.joined("engine", "pool")
    index.pools.apply("pool", BlockStored([*map(number_of, hashes)], [], 1, medium=POOL_MEDIUM))
    for event in decode_batch(payload).events:
        index.apply("engine", event)

    def loadable(extra: list[bytes | None], root: int) -> int:
        prefix = token_hashes(TOKENS, BLOCK_TOKENS, root, extra)
        return index.match_tiers(prefix, ["engine"])[0]

    own = [salt_key(salt)] if salt else []
    assert loadable([*own], token_root(lora)) == 3
    assert loadable([salt_key("another")], token_root(lora)) == 0
    assert loadable([*own], token_root("another")) == 0
    assert index.num_orphans == 0
