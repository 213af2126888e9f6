"""The object store tier against a real S3 server, a folder and memory."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.testing.tier_contract import (
    VALUE_BYTES,
    TierContract,
    block_key,
    read,
    value_bytes,
    write,
)
from kvkeep.tiers.base import Tier
from kvkeep.tiers.entry_names import HEAD_BYTES, entry_name
from kvkeep.tiers.object_store import ObjectStoreSettings, ObjectStoreTier
from tests.servers.heads import HEAD_DAMAGES, stored
from tests.servers.processes import free_port
from tests.servers.seaweed import READER_KEY, READER_SECRET, SeaweedServer

_prefixes = (f"test-{number}/" for number in itertools.count())


@pytest.fixture(scope="module")
def server() -> Iterator[SeaweedServer]:
    server = SeaweedServer().run()
    yield server
    server.stop()


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test has."""
    return next(_prefixes)


@pytest.fixture
def tier(server: SeaweedServer, prefix: str) -> Iterator[ObjectStoreTier]:
    tier = ObjectStoreTier(server.settings(prefix=prefix, timeout_s=60.0))
    yield tier
    tier.close()


class TestObjectStoreTier(TierContract):
    @pytest.fixture
    def tier(self, server: SeaweedServer, prefix: str) -> Iterator[Tier]:
        tier = ObjectStoreTier(server.settings(prefix=prefix, timeout_s=60.0))
        yield tier
        tier.close()


class TestObjectStoreTierInFolder(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = ObjectStoreTier(ObjectStoreSettings(url=f"file://{tmp_path}/store"))
        yield tier
        tier.close()


class TestObjectStoreTierInMemory(TierContract):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = ObjectStoreTier(ObjectStoreSettings(url="memory://"))
        yield tier
        tier.close()


def test_a_block_is_one_object(tier: ObjectStoreTier, server: SeaweedServer, prefix: str) -> None:
    """Head and bytes under the block's name."""
    write(tier, [1])

    size = server.store().head(entry_name(block_key(1), prefix))["size"]

    assert size == HEAD_BYTES + VALUE_BYTES


@pytest.mark.parametrize("damage", HEAD_DAMAGES, ids=lambda damage: damage.__name__)
def test_an_object_with_a_damaged_head_is_dropped_and_counted(
    tier: ObjectStoreTier, server: SeaweedServer, prefix: str, damage: Callable[[bytes], bytes]
) -> None:
    """It is gone after the first read, and its neighbor is served."""
    write(tier, [1, 2])
    name = entry_name(block_key(1), prefix)
    server.store().put(name, damage(stored(1, prefix)), use_multipart=False)

    assert read(tier, [block_key(1), block_key(2)]) == [None, value_bytes(2)]
    assert [entry["path"] for page in server.store().list(prefix) for entry in page] == [
        entry_name(block_key(2), prefix)
    ]
    assert tier.num_rotten == 1
    assert write(tier, [1]) == [True]
    assert read(tier, [block_key(1)]) == [value_bytes(1)]


def test_what_is_whole_is_not_dropped(tier: ObjectStoreTier) -> None:
    """An object longer than the room is no rot."""
    write(tier, [1])

    assert read(tier, [block_key(1)], VALUE_BYTES - 1) == [None]
    assert tier.num_rotten == 0
    assert read(tier, [block_key(1)]) == [value_bytes(1)]


def test_large_values_come_through(tier: ObjectStoreTier) -> None:
    """Values beyond what the server keeps in one piece, more of them than threads."""
    length = (9 << 20) + 1
    assert write(tier, range(10), length) == [True] * 10

    assert read(tier, [block_key(9), block_key(0)], length) == [
        value_bytes(9, length),
        value_bytes(0, length),
    ]


def test_deployments_share_a_bucket(tier: ObjectStoreTier, server: SeaweedServer) -> None:
    """Another prefix sees, lists and deletes nothing of ours, nor does a stranger's object harm."""
    theirs = next(_prefixes)
    server.store().put(theirs + "something", b"else")
    other = ObjectStoreTier(server.settings(prefix=theirs))
    write(tier, [1])
    other.delete([block_key(1)])

    assert (list(other.keys()), other.lookup([block_key(1)])) == ([], [False])
    assert read(other, [block_key(1)]) == [None]
    assert list(tier.keys()) == [block_key(1)]

    other.close()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"secret_access_key": "hunter2"}, "mend AWS_ACCESS_KEY_ID and its secret"),
        ({"access_key_id": "nobody"}, "mend AWS_ACCESS_KEY_ID and its secret"),
        ({"url": "s3://no-such-bucket"}, "has no such bucket: create it"),
    ],
)
def test_a_refusal_is_one_sentence(
    server: SeaweedServer, settings: dict[str, object], sentence: str
) -> None:
    """Of every call; it names the bucket, says what to do, and shows no secret."""
    tier = ObjectStoreTier(server.settings(**settings))
    calls: list[Callable[[], object]] = [lambda: read(tier, [block_key(1)])]
    if "url" not in settings:  # this server makes the bucket then
        calls.append(lambda: write(tier, [1]))
    for call in calls:
        with pytest.raises(UnavailableError, match=sentence) as caught:
            call()
        text = f"{caught.value} {tier!r} {server.settings(**settings)!r}"

        assert f"s3://{'no-such-bucket' if 'url' in settings else 'blocks'}" in text
        assert "hunter2" not in text
        assert "\n" not in str(caught.value)
    tier.close()


def test_one_who_may_only_read(tier: ObjectStoreTier, server: SeaweedServer, prefix: str) -> None:
    """Reads what others wrote, and learns with the first write what is missing."""
    write(tier, [1])
    reader = ObjectStoreTier(
        server.settings(prefix=prefix, access_key_id=READER_KEY, secret_access_key=READER_SECRET)
    )

    assert read(reader, [block_key(1)]) == [value_bytes(1)]
    with pytest.raises(UnavailableError, match="or the rights"):
        write(reader, [2])

    reader.close()


def test_keys_from_the_environment(
    server: SeaweedServer, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """As every other program of S3 finds them."""
    known = server.settings()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", known.access_key_id or "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", known.secret_access_key or "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    tier = ObjectStoreTier(ObjectStoreSettings(url=known.url, prefix=prefix))

    assert write(tier, [1]) == [True]
    assert read(tier, [block_key(1)]) == [value_bytes(1)]

    tier.close()


def test_nobody_there_is_one_sentence(server: SeaweedServer) -> None:
    """The address and what to look at, within the time limit."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    tier = ObjectStoreTier(server.settings(endpoint=endpoint))

    with pytest.raises(UnavailableError, match=f"at {endpoint} can't be reached.*whether it runs"):
        read(tier, [block_key(1)])

    tier.close()
