"""The plug-in as LMCache calls it, without LMCache: keys, tags, memory, and no writing."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvkeep.adapters.lmcache_plugin import TAG, CartridgePlugin, find_cartridge
from kvkeep.cartridges.registry import Registry
from kvkeep.model.errors import InputError
from tests.unit.cartridges.made import contents, draft

CHUNK = 4
SHAPE = (10, 2, 3)
IDS = list(range(100, 110))
NONE_HASH = "what hashes begin with"


class Database:
    """LMCache's, as far as it is used; making one has its side effect."""

    def __init__(self, config: Any, metadata: Any) -> None:
        vars(sys.modules["lmcache.v1.token_database"])["NONE_HASH"] = "another"
        self.size = config.chunk_size

    def process_tokens(
        self, *, tokens: list[int], make_key: bool
    ) -> Iterator[tuple[int, int, int]]:
        assert not make_key
        for begin in range(0, len(tokens), self.size):
            end = min(begin + self.size, len(tokens))
            yield begin, end, hash(tuple(tokens[:end]))


class Memory:
    """Of LMCache: hands out tensors."""

    def __init__(self) -> None:
        self.is_full = False

    def allocate(self, shape: Any, dtype: Any, fmt: str) -> Any:
        assert fmt == "KV_2LTD"
        return None if self.is_full else SimpleNamespace(tensor=torch.zeros(shape, dtype=dtype))


@pytest.fixture(autouse=True)
def _lmcache(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {
        "token_database": {"ChunkedTokenDatabase": Database, "NONE_HASH": NONE_HASH},
        "memory_management": {"MemoryFormat": SimpleNamespace(KV_2LTD="KV_2LTD")},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"lmcache.v1.{name}", module)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    with Registry(tmp_path) as registry:
        registry.register_contents(draft("ships"), contents(2, shape=SHAPE, token_ids=IDS))
        half = contents(2, shape=SHAPE, dtype="bfloat16", token_ids=IDS)
        registry.register_contents(draft("half"), half)
    return tmp_path


@pytest.fixture
def plugin(library: Path) -> Iterator[CartridgePlugin]:
    made = make_plugin(library)
    yield made
    made.close()


def make_plugin(
    library: Path | str | None, dtype: torch.dtype = torch.float32, **more: Any
) -> CartridgePlugin:
    extra = {**({} if library is None else {"kvkeep.library": str(library)}), **more}
    config = SimpleNamespace(extra_config={"other": 1, **extra}, chunk_size=CHUNK)
    return CartridgePlugin(
        dst_device="cpu", config=config, metadata=metadata(dtype), local_cpu_backend=Memory()
    )


def metadata(dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    told = {
        "model_name": "tiny", "kv_shape": (2, 2, CHUNK, 2, 3), "kv_dtype": dtype,
        "world_size": 1, "worker_id": 0, "use_mla": False,
    }  # fmt: skip
    return SimpleNamespace(**{**told, **more})


def key(cartridge_id: str | None, num_tokens: int = CHUNK, *more: tuple[str, str]) -> Any:
    tags = more if cartridge_id is None else (*more, (TAG, cartridge_id))
    return SimpleNamespace(tags=tags or None, chunk_hash=hash(tuple(IDS[:num_tokens])))


class TestKeys:
    @pytest.mark.parametrize(
        ("tags", "found"),
        [
            (((TAG, "ships"),), "ships"),
            ((("user", "x"), (TAG, "ships")), "ships"),
            (((TAG, 7),), "7"),
            (None, None),
            ((), None),
            ((("user", "ships"),), None),
            ((TAG,), None),
            (((TAG, "a", "b"),), None),
        ],
    )
    def test_a_tag_names_the_cartridge(self, tags: Any, found: str | None) -> None:
        """One of kvkeep's name, among any others; anything else names none."""
        assert find_cartridge(SimpleNamespace(tags=tags)) == found

    def test_a_key_without_tags_names_none(self) -> None:
        """As those of other versions may be."""
        assert find_cartridge(object()) is None


class TestReading:
    def test_chunks_of_the_named_cartridge_are_there(self, plugin: CartridgePlugin) -> None:
        """Whole ones, of exactly its tokens."""
        assert plugin.contains(key("ships"))
        assert plugin.contains(key("ships", 2 * CHUNK))
        assert not plugin.contains(key("ships", 10))
        assert not plugin.contains(key("bees"))

    def test_who_names_none_gets_none(self, plugin: CartridgePlugin) -> None:
        """Though the tokens are the same."""
        assert not plugin.contains(key(None))
        assert plugin.get_blocking(key(None)) is None
        assert not plugin.contains(key(None, CHUNK, ("user", "ships")))

    def test_a_chunk_comes_in_lmcache_s_memory(self, plugin: CartridgePlugin) -> None:
        """Its shape is [2, layers, tokens, heads * dim], its bits are the cartridge's."""
        chunk = plugin.get_blocking(key("ships", 2 * CHUNK))
        layers = contents(2, shape=SHAPE, token_ids=IDS).layers
        value = torch.from_numpy(layers[1][1].numpy().copy())[CHUNK : 2 * CHUNK]

        assert chunk.tensor.shape == (2, 2, CHUNK, 6)
        assert torch.equal(chunk.tensor[1, 1], value.reshape(CHUNK, 6))

    def test_bits_of_bfloat16_stay(self, library: Path) -> None:
        """There are no such numbers in numpy; none is converted."""
        plugin = make_plugin(library, torch.bfloat16)
        chunk = plugin.get_blocking(key("half"))
        layers = contents(2, shape=SHAPE, dtype="bfloat16", token_ids=IDS).layers
        own = bytearray(layers[0][0].data)
        wanted = torch.frombuffer(own, dtype=torch.bfloat16).reshape(SHAPE)
        plugin.close()

        assert chunk.tensor.dtype == torch.bfloat16
        assert torch.equal(chunk.tensor[0, 0], wanted[:CHUNK].reshape(CHUNK, 6))

    def test_what_is_missing_is_none(self, plugin: CartridgePlugin) -> None:
        """Another cartridge, and another text."""
        assert plugin.get_blocking(key("bees")) is None
        assert plugin.get_blocking(key("ships", 3)) is None

    def test_no_room_is_a_miss(self, plugin: CartridgePlugin) -> None:
        """LMCache computes the chunk."""
        plugin.local_cpu_backend.is_full = True

        assert plugin.get_blocking(key("ships")) is None

    def test_batches_end_at_the_first_miss(self, plugin: CartridgePlugin) -> None:
        """What counts is the longest prefix."""
        keys = [key("ships"), key("ships", 2 * CHUNK), key("ships", 10), key("ships")]

        assert plugin.batched_contains(keys) == 2
        assert [chunk is None for chunk in plugin.batched_get_blocking(keys)] == [
            False, False, True, False,
        ]  # fmt: skip

    async def test_and_so_do_those_of_its_event_loop(self, plugin: CartridgePlugin) -> None:
        """LMCache prefetches with these."""
        keys = [key("ships"), key("ships", 10), key("ships")]

        assert await plugin.batched_async_contains("id", keys) == 1
        assert len(await plugin.batched_get_non_blocking("id", keys)) == 1

    def test_the_scheduler_s_plug_in_only_answers(self, library: Path) -> None:
        """There is no memory to hand chunks out in."""
        plugin = make_plugin(library)
        plugin.local_cpu_backend = None

        assert plugin.contains(key("ships"))
        assert plugin.get_blocking(key("ships")) is None
        plugin.close()

    def test_a_wrong_model_is_a_miss(self, library: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It is named; what cartridges call the model can be said."""
        wrong = make_plugin(library, **{"kvkeep.model": "large"})
        assert not wrong.contains(key("ships"))
        wrong.close()

        assert "model mismatch, cartridge tiny and engine large" in caplog.text

    def test_hashes_begin_as_they_did(self, plugin: CartridgePlugin) -> None:
        """Asking how LMCache hashes changes nothing for LMCache, nor for vLLM's own cache."""
        assert plugin.contains(key("ships"))

        module: Any = sys.modules["lmcache.v1.token_database"]
        assert module.NONE_HASH == NONE_HASH


class TestKeeping:
    def test_pin_and_unpin(self, plugin: CartridgePlugin) -> None:
        """What is there can be pinned, what is pinned unpinned."""
        assert plugin.pin(key("ships"))
        assert plugin.contains(key("ships", 2 * CHUNK), pin=True)
        assert not plugin.remove(key("ships"), force=False)
        assert plugin.unpin(key("ships"))
        assert plugin.unpin(key("ships", 2 * CHUNK))
        assert not plugin.unpin(key("ships"))
        assert plugin.remove(key("ships"), force=False)

    def test_what_names_none_can_t_be(self, plugin: CartridgePlugin) -> None:
        """Neither pinned, nor unpinned, nor removed."""
        assert not plugin.pin(key(None))
        assert not plugin.unpin(key(None))
        assert not plugin.remove(key(None))
        assert not plugin.pin(key("bees"))

    def test_removing_takes_it_out_of_memory_only(self, plugin: CartridgePlugin) -> None:
        """LMCache clears caches; a cartridge is no cache's to forget."""
        plugin.pin(key("ships"))

        assert plugin.batched_remove([key("ships"), key("bees")]) == 1
        assert plugin.contains(key("ships"))

    async def test_nothing_is_ever_written(self, plugin: CartridgePlugin) -> None:
        """Puts do nothing, call nobody back, and are never under way."""
        told: list[object] = []
        plugin.batched_submit_put_task([key("bees")], [object()], None, told.append)
        await plugin.async_batched_submit_put_task([key("bees")], [object()], None, told.append)

        assert told == []
        assert not plugin.exists_in_put_tasks(key("bees"))
        assert not plugin.contains(key("bees"))

    def test_the_rest_of_what_lmcache_calls(self, plugin: CartridgePlugin) -> None:
        """Its memory is LMCache's own; after the end there is nothing."""
        assert plugin.get_allocator_backend() is plugin.local_cpu_backend
        plugin.touch_cache()
        plugin.cancel_request("r")
        plugin.close()

        assert not plugin.contains(key("ships"))
        assert plugin.get_blocking(key("ships")) is None


class TestSettings:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"kvkeep.libary": "x"}, "extra_config has no kvkeep.libary: choose from"),
            ({"kvkeep.bytes_max": "4GiB"}, "kvkeep.bytes_max must be a number of bytes"),
            ({"kvkeep.bytes_max": -1}, "kvkeep.bytes_max must be a number of bytes"),
            ({"kvkeep.trusted_keys": "missing.pem"}, "missing.pem"),
            ({"kvkeep.library": ""}, "names no kvkeep.library"),
        ],
    )
    def test_what_is_wrong_is_said(self, library: Path, more: dict[str, Any], said: str) -> None:
        """LMCache logs the sentence and goes on without the plug-in."""
        with pytest.raises(InputError, match=said):
            make_plugin(library, **more)

    def test_a_library_has_to_be_named(self) -> None:
        """An engine's user is seldom the one who registers."""
        with pytest.raises(InputError, match="names no kvkeep"):
            make_plugin(None)

    @pytest.mark.parametrize("name", ["use_layerwise", "enable_blending"])
    def test_layers_one_by_one_are_refused(self, library: Path, name: str) -> None:
        """A cartridge comes whole."""
        config = SimpleNamespace(
            extra_config={"kvkeep.library": str(library)}, chunk_size=CHUNK, **{name: True}
        )
        with pytest.raises(InputError, match="leave use_layerwise and enable_blending out"):
            CartridgePlugin(config=config, metadata=metadata())

    def test_latent_kv_is_refused(self, library: Path) -> None:
        """A cartridge has keys and values by head."""
        config = SimpleNamespace(extra_config={"kvkeep.library": str(library)}, chunk_size=CHUNK)
        with pytest.raises(InputError, match="MLA"):
            CartridgePlugin(config=config, metadata=metadata(use_mla=True))

    def test_without_lmcache_s_configuration_there_is_no_plug_in(self) -> None:
        """Nobody else makes one."""
        with pytest.raises(InputError, match="let LMCache make it"):
            CartridgePlugin()
