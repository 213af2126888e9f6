"""What the Mooncake tier does before anything is sent: settings, places in memory, requests."""

import importlib.util
import mmap
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.tiers.base import length_of
from kvkeep.tiers.mooncake import listening
from kvkeep.tiers.mooncake.listening import listening_address
from kvkeep.tiers.mooncake.placing import clipped, cut, place
from kvkeep.tiers.mooncake.requests import SCRATCH_REGION, Ask, Operation, ask_decoder, ask_encoder
from kvkeep.tiers.mooncake.settings import REQUEST_BYTES_MAX, MooncakeSettings
from kvkeep.tiers.mooncake.shared_regions import Region, find_region
from kvkeep.tiers.mooncake.tier import MooncakeTier

MASTER = "127.0.0.1:50051"
PAGE = mmap.PAGESIZE
NAMED = [(socket.AF_INET6, "2001:db8::7"), (socket.AF_INET, "192.0.2.7")]


@pytest.fixture
def shared() -> Iterator[memoryview]:
    """Four pages of a file that is gone from its folder."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(4 * PAGE)
        memory = mmap.mmap(file.fileno(), 4 * PAGE)
    with memory, memoryview(memory) as window:
        yield window


def found(memory: memoryview, number: int = 1) -> Region:
    """The region behind memory that has one; its descriptor is closed."""
    region = find_region(memory, number)
    assert region is not None
    os.close(region.fd)
    return region


class TestSettings:
    @pytest.mark.parametrize(
        ("wrong", "word"),
        [
            ({"master": "nowhere"}, "host:port"),
            ({"master": "host:0"}, "host:port"),
            ({"master": "h:1:2"}, "host:port"),
            ({"master": "a b:1"}, "host:port"),
            ({"local_hostname": "a b"}, "local_hostname"),
            ({"protocol": "carrier pigeon"}, "tcp or rdma"),
            ({"timeout_s": 0.0}, "timeout_s"),
            ({"timeout_s": float("nan")}, "timeout_s"),
            ({"replica_num": 0}, "replica_num"),
            ({"segment_bytes": -1}, "segment_bytes"),
            ({"value_bytes_max": 1 << 40}, "value_bytes_max"),
            ({"prefix": "no end"}, "prefix"),
            ({"listen_address": "localhost"}, "listen_address"),
        ],
    )
    def test_a_wrong_setting_is_named(self, wrong: dict[str, Any], word: str) -> None:
        """Bad settings stop the start with a sentence that says which."""
        settings: dict[str, Any] = {"master": MASTER} | wrong

        with pytest.raises(InputError, match=word):
            MooncakeSettings(**settings)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without Mooncake the tier says how to get it."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

        with pytest.raises(InputError, match="pip install"):
            MooncakeTier(MooncakeSettings(master=MASTER))


class TestListening:
    @pytest.mark.parametrize(
        ("settings", "address"),
        [
            ({}, "127.0.0.1"),
            ({"local_hostname": "192.0.2.7"}, "192.0.2.7"),
            ({"local_hostname": "192.0.2.7:12345"}, "192.0.2.7"),
            ({"local_hostname": "2001:db8::7"}, "2001:db8::7"),
            ({"local_hostname": "[2001:db8::7]:12345"}, "2001:db8::7"),
            ({"local_hostname": "192.0.2.7", "listen_address": "192.0.2.8"}, "192.0.2.8"),
            ({"listen_address": "0.0.0.0"}, ""),
            ({"listen_address": "::"}, ""),
        ],
    )
    def test_it_is_where_peers_look_unless_told(
        self, settings: dict[str, Any], address: str
    ) -> None:
        """An address as such, a name resolved, a port left out; empty is every address."""
        assert listening_address(MooncakeSettings(master=MASTER, **settings)) == address

    def test_a_name_is_resolved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """To its IPv4 address, if it has one, as Mooncake does."""
        found = [(family, 0, 0, "", (text, 0)) for family, text in NAMED]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)
        settings = MooncakeSettings(master=MASTER, local_hostname="node7")

        assert listening_address(settings) == "192.0.2.7"

    def test_a_name_without_an_address_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tier is away as long as nobody knows the name."""

        def unknown(*_args: object, **_kwargs: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        settings = MooncakeSettings(master=MASTER, local_hostname="no.such.host.invalid")

        with pytest.raises(UnavailableError, match=r"local_hostname 'no\.such\.host\.invalid'"):
            listening_address(settings)

    def test_without_the_compiled_part_nothing_opens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rather than on every address the tier opens nowhere, and says how to mend that."""
        monkeypatch.setattr(listening, "find_library", lambda: None)

        with pytest.raises(InputError, match=r"not on 127\.0\.0\.1 alone.*C compiler"):
            MooncakeTier(MooncakeSettings(master=MASTER))
        listening.check_library(MooncakeSettings(master=MASTER, listen_address="0.0.0.0"))

    def test_what_is_preloaded_already_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An operator's own libraries come after it."""
        monkeypatch.setenv("LD_PRELOAD", "/usr/lib/other.so")

        environment = listening.listening_environment("192.0.2.7")

        assert environment["LD_PRELOAD"] == f"{listening.find_library()}:/usr/lib/other.so"
        assert environment[listening.ADDRESS_VARIABLE] == "192.0.2.7"
        assert listening.listening_environment("") == {}


class TestSharedRegions:
    def test_a_shared_file_is_found_by_address(self, shared: memoryview) -> None:
        """What is written through the found file at the found offset is seen in the memory."""
        region = find_region(shared[PAGE + 10 : 3 * PAGE], 7)
        assert region is not None
        os.pwrite(region.fd, b"here", region.offset)
        os.close(region.fd)

        assert bytes(shared[PAGE + 10 : PAGE + 14]) == b"here"
        assert (region.number, region.num_bytes) == (7, 2 * PAGE - 10)

    def test_memory_without_a_file_is_not_found(self) -> None:
        """Memory of this process alone, or of nobody's file, can't be mapped by another."""
        with mmap.mmap(-1, PAGE) as memory, memoryview(memory) as window:
            assert find_region(window, 1) is None
        assert find_region(memoryview(bytearray(PAGE)), 1) is None

    def test_a_private_copy_is_not_found(self, shared: memoryview) -> None:
        """Writes through the file would not reach a private mapping."""
        fd = found(shared).fd
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.truncate(PAGE)
            private = mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE)
        with private, memoryview(private) as window:
            region = find_region(window, 1)

        assert region is None
        assert fd > 0

    def test_a_mapping_in_several_pieces_is_one(self, shared: memoryview) -> None:
        """The kernel lists a mapping piecewise where its parts were advised differently."""
        memory = shared.obj
        assert isinstance(memory, mmap.mmap)
        memory.madvise(mmap.MADV_DONTFORK, PAGE, PAGE)

        assert found(shared).num_bytes == 4 * PAGE


class TestPlaces:
    def test_parts_in_a_region_stay_where_they_are(self, shared: memoryview) -> None:
        """A slot of the pool is named, a header beside it goes through the scratch."""
        region = found(shared, 3)
        header, slot = memoryview(bytearray(24)), shared[PAGE : 2 * PAGE]

        (placed,) = place([[header, slot]], [region], 1000)

        assert placed.pieces == [(SCRATCH_REGION, 1000, 24), (3, PAGE, PAGE)]
        assert placed.copies == [(1000, header)]
        assert placed.shared_bytes == PAGE

    def test_a_part_across_the_end_of_a_region_is_not_in_it(self, shared: memoryview) -> None:
        """Half in shared memory is not in it."""
        region = found(shared[:PAGE])

        (placed,) = place([[shared[10 : PAGE + 10]]], [region], 0)

        assert placed.pieces == [(SCRATCH_REGION, 0, PAGE)]

    def test_parts_in_the_scratch_follow_each_other(self) -> None:
        """Values of other memory are one piece each, and share nothing."""
        values = [[memoryview(bytearray(10)), memoryview(b""), memoryview(bytearray(5))]] * 2

        placed = place(values, [], 100)

        assert [one.pieces for one in placed] == [
            [(SCRATCH_REGION, 100, 15)],
            [(SCRATCH_REGION, 115, 15)],
        ]

    def test_clipping_keeps_the_leading_bytes(self) -> None:
        """Room is cut to a length across its pieces."""
        whole = memoryview(bytearray(range(20)))
        room = [whole[:8], whole[8:8], whole[8:16], whole[16:]]

        assert [bytes(part) for part in clipped(room, 10)] == [bytes(range(8)), bytes([8, 9])]
        assert list(clipped(room, 0)) == []


class TestRequests:
    def test_a_batch_is_cut_by_bytes(self) -> None:
        """No request holds more than it may but for one value; nothing that fits is left out."""
        sizes = [REQUEST_BYTES_MAX // 2, REQUEST_BYTES_MAX // 2, 1, 2 * REQUEST_BYTES_MAX, 5]
        zeros = memoryview(mmap.mmap(-1, max(sizes)))
        values = [[zeros[:size]] for size in sizes]

        assert list(cut(values, 2 * REQUEST_BYTES_MAX)) == [[0, 1], [2], [3], [4]]

    def test_what_is_empty_or_too_long_is_left_out(self) -> None:
        """Neither could be kept."""
        values = [[memoryview(bytearray(size))] for size in (0, 8, 9)]

        assert list(cut(values, 8)) == [[1]]
        assert length_of(values[1]) == 8

    def test_requests_survive_the_way(self) -> None:
        """What one process encodes is what the other decodes."""
        ask = Ask(Operation.WRITE, ["a", "b"], [[(0, 1, 2)], [(1, 1 << 40, 3), (0, 0, 1)]])

        assert ask_decoder.decode(ask_encoder.encode(ask)) == ask
        with pytest.raises(msgspec.ValidationError):
            ask_decoder.decode(msgspec.msgpack.encode(["unknown", [], []]))
