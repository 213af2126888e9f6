"""What an engine says its stored blocks are of."""

from types import SimpleNamespace
from typing import Any

from kvkeep.connector.scheduler.block_names import TOLD_MAX, BlockNames
from kvkeep.model.announced import number_of
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import HASH_BYTES, Namespace

BLOCK_TOKENS = 4
NAMESPACE = Namespace(b"n" * HASH_BYTES)


def request(num_tokens: int, salt: str | None = None, lora: str | None = None) -> Any:
    adapter = None if lora is None else SimpleNamespace(lora_name=lora)
    return SimpleNamespace(
        all_token_ids=list(range(num_tokens)), cache_salt=salt, lora_request=adapter
    )


def test_a_prompt_is_named_once_and_goes_on() -> None:
    """The first time whole, later only what is new, behind the number of the block before."""
    names, asked = BlockNames(BLOCK_TOKENS), request(14)
    hashes = BlockHasher(NAMESPACE, BLOCK_TOKENS).extend(asked.all_token_ids)
    numbers = [number_of(block_hash) for block_hash in hashes]
    names.tell(asked, hashes[:2])
    (first,) = names.take()
    names.tell(asked, hashes)
    (second,) = names.take()
    names.tell(asked, hashes)

    assert (first.numbers, first.parent, first.token_ids) == (numbers[:2], None, list(range(8)))
    assert (second.numbers, second.parent) == (numbers[2:], numbers[1])
    assert second.token_ids == list(range(8, 12))
    assert names.take() == []


def test_salt_and_adapter_are_told() -> None:
    """A router finds both in requests; the salt belongs to the first block."""
    names, asked = BlockNames(BLOCK_TOKENS), request(8, "salt", "adapter")
    hashes = BlockHasher(NAMESPACE, BLOCK_TOKENS).extend(asked.all_token_ids)
    names.tell(asked, hashes[:1])
    names.tell(asked, hashes)
    first, second = names.take()

    assert (first.salt, first.lora_name) == ("salt", "adapter")
    assert (second.salt, second.lora_name) == (None, "adapter")


def test_what_was_told_long_ago_is_told_again() -> None:
    """Only so many numbers are remembered."""
    names, asked = BlockNames(1), request(TOLD_MAX + 1)
    hashes = BlockHasher(NAMESPACE, 1).extend(asked.all_token_ids)
    names.tell(asked, hashes)
    names.tell(asked, hashes[:1])

    assert [len(named.numbers) for named in names.take()] == [TOLD_MAX + 1, 1]
