"""Engines of several tensor-parallel sizes on one pool, and what each rank of them held."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx

from kvkeep.model.ids import BlockHash
from kvkeep.router.handoff.transports.nixl import NixlTransport
from kvkeep.router.handoff.transports.pool import PoolTransport
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.programs.reaper import is_rank_file
from kvkeep.stack.supervisor import Stack
from kvkeep.tiers.pool_inode import FILE_HEADER_BYTES
from kvkeep.tiers.shared_memory import PoolView
from kvkeep.tiers.slot_header import (
    DIGEST_BYTES,
    HEADER_BYTES,
    SlotHeader,
    SlotState,
    pack_header,
    unpack_header,
)
from tests.e2e.kv_notes import FOLDER_VARIABLE, Pages, What, read_notes
from tests.e2e.nixl_threads import SPINNING, give_back
from tests.integration.daemons import wait_until
from tests.servers.processes import free_port

ROOT = Path(__file__).parent.parent.parent
TOP = 20
TIMES_THE_FLOOR = 2.0
"""How much further than the answers of the two sizes without any cache a hand-off may lead."""
REQUEST_TIMEOUT_S = 240.0
NIXL_LEASE_S = 240.0
MODEL_LEN_MAX = 2048
START_TIMEOUT_S = 600
"""Four engines and their ranks are eleven processes that load libraries at once."""
_FIRST_ID, _LAST_ID = 100, 40_000
"""Of the tokens that prompts are made of."""


def make_prompts(block_tokens: int, seed: int) -> list[list[int]]:
    """Prompts of tokens drawn at random: one a block and a token, one of whole blocks, others."""
    rng = Random(seed)
    lengths = [block_tokens + 1, 3 * block_tokens, 4 * block_tokens + 7, 2 * block_tokens + 1]
    return [[rng.randint(_FIRST_ID, _LAST_ID) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Reply:
    """The first token of an answer."""

    top: Mapping[str, float]
    """Log probabilities of the likeliest tokens."""
    num_prompt: int
    num_cached: int
    params: Mapping[str, Any]
    """``kv_transfer_params`` of the answer."""
    route: str
    """What a router says of its way."""

    @property
    def num_computed(self) -> int:
        """Tokens of the prompt that the engine computed."""
        return self.num_prompt - self.num_cached


def difference(one: Reply, other: Reply) -> float:
    """By how many nats two first tokens' log probabilities differ at least, at the worst token.

    Of a token that only one of them lists it is known that the other's is not above its last.
    """
    pairs = [(one.top, other.top), (other.top, one.top)]
    found = [abs(one.top[token] - other.top[token]) for token in one.top.keys() & other.top.keys()]
    for mine, theirs in pairs:
        found += [mine[token] - min(theirs.values()) for token in mine.keys() - theirs.keys()]
    return max(found)


@dataclass
class Fleet:
    """A running stack whose engines are watched; any of them can be prefill or decode engine."""

    stack: Stack
    folder: Path
    block_tokens: int
    sizes: Mapping[str, int]
    """Tensor-parallel size by the engine's name."""
    prompts: Sequence[list[int]]
    transport: PoolTransport | NixlTransport
    _num_salts: int = 0
    _cold: dict[str, list[Reply]] = field(default_factory=dict)

    def salt(self) -> str:
        """Under which nobody has asked."""
        self._num_salts += 1
        return f"salt {self._num_salts}"

    def ask(
        self,
        url: str,
        prompt: Sequence[int],
        salt: str,
        params: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Ask an engine or a router for one token."""
        body: dict[str, Any] = {
            "model": self.stack.model_name,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": TOP,
            "return_tokens_as_token_ids": True,
            "cache_salt": salt,
        }
        if params is not None:
            body["kv_transfer_params"] = params
        answer = httpx.post(
            f"{url}/v1/completions", json=body, timeout=REQUEST_TIMEOUT_S, trust_env=False
        )
        assert answer.status_code == httpx.codes.OK, answer.text
        told = answer.json()
        usage = told["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return Reply(
            top=told["choices"][0]["logprobs"]["top_logprobs"][0],
            num_prompt=usage["prompt_tokens"],
            num_cached=details.get("cached_tokens") or 0,
            params=told.get("kv_transfer_params") or {},
            route=answer.headers.get("x-kvkeep-route", ""),
        )

    def cold(self, engine: str) -> list[Reply]:
        """What an engine answers to the prompts without any cache."""
        if engine not in self._cold:
            url = self.stack.engines[engine].url
            self._cold[engine] = [self.ask(url, prompt, self.salt()) for prompt in self.prompts]
            assert [reply.num_cached for reply in self._cold[engine]] == [0] * len(self.prompts)
        return self._cold[engine]

    def floor(self) -> float:
        """How far the sizes themselves are from each other: the worst prompt of any two engines."""
        answers = [self.cold(engine) for engine in self.sizes]
        return max(
            difference(*pair)
            for one in answers
            for other in answers
            for pair in zip(one, other, strict=True)
        )

    def offer(self, engine: str, prompt: Sequence[int], salt: str) -> Reply:
        """Have an engine compute a prompt for another."""
        params = json.loads(self.transport.prefill_params())
        return self.ask(self.stack.engines[engine].url, prompt, salt, params)

    def take(self, engine: str, prompt: Sequence[int], salt: str, offered: Reply) -> Reply:
        """Have an engine answer a prompt that another has computed."""
        params = self.transport.decode_params(json.dumps(offered.params).encode())
        assert params is not None, offered.params
        return self.ask(self.stack.engines[engine].url, prompt, salt, json.loads(params))

    # ---- what ranks held

    def held(self, engine: str, what: What) -> dict[str, Pages]:
        """Blocks that all ranks of an engine have stored or loaded, and what they held then."""
        return read_notes(_notes_folder(self.folder, engine), what, self.sizes[engine])

    def swap_heads(self, blocks: Sequence[str], layer: int, one: int, other: int) -> None:
        """Exchange two head pages in the slots of stored blocks, so that no digest tells.

        Waits until all of them are readable.
        """
        path = self.stack.daemon.pool
        with open(path, "rb") as file:
            pool_id = os.pread(file.fileno(), 16, 16)
        view = PoolView.open(path, pool_id)
        wanted = {BlockHash(bytes.fromhex(block)) for block in blocks}
        slots: list[int] = []

        def are_readable() -> bool:
            slots[:] = [
                slot
                for slot in range(view.geometry.num_slots)
                if (header := _header_of(view, slot)) is not None
                and header.state is SlotState.READY
                and header.key is not None
                and header.key.block_hash in wanted
            ]
            return len(slots) == len(wanted)

        wait_until(are_readable, "the blocks are in the pool", REQUEST_TIMEOUT_S)
        for slot in slots:
            _swap(view, slot, layer, one, other)


def _place_of(view: PoolView, slot: int) -> slice:
    """Header and digests of a slot."""
    start = FILE_HEADER_BYTES + slot * view.geometry.header_stride
    return slice(start, start + HEADER_BYTES + DIGEST_BYTES * view.geometry.layout.num_pages)


def _header_of(view: PoolView, slot: int) -> SlotHeader | None:
    return unpack_header(bytes(view.region[_place_of(view, slot)]))


def _swap(view: PoolView, slot: int, layer: int, one: int, other: int) -> None:
    layout = view.geometry.layout
    pages = view.payload(slot).reshape(layout.num_layers, layout.num_heads, layout.page_bytes)
    header = _header_of(view, slot)
    assert header is not None
    for heads in (pages, view.digests[slot]):
        heads[layer, [one, other]] = heads[layer, [other, one]]
    place = _place_of(view, slot)
    digests = bytes(view.region[place.start + HEADER_BYTES : place.stop])
    view.region[place.start : place.start + HEADER_BYTES] = pack_header(header, digests)


# ---- starting


def _notes_folder(folder: Path, engine: str) -> Path:
    return folder / "notes" / engine


def _cores(name: str, size: int) -> list[int]:
    first = ord(name[0]) + size
    return [(first + rank) % 2 for rank in range(size)]


def _engine(name: str, size: int, block_tokens: int) -> dict[str, Any]:
    return {
        "name": name,
        "tensor_parallel": size,
        "cpus": "|".join(map(str, _cores(name, size))),
        "block_tokens": block_tokens,
        "kv_cache_bytes": "128MiB",
        "max_model_len": MODEL_LEN_MAX,
        "dtype": "float32",
    }


def _watched(folder: Path, engine: str) -> dict[str, Any]:
    """Of an engine that hands over through the pool and takes notes."""
    notes = _notes_folder(folder, engine)
    notes.mkdir(parents=True)
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    connector = {
        "kv_connector": "WatchedConnector",
        "kv_connector_module_path": "tests.e2e.watched_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "socket": _socket(folder),
            # A machine that has other things to do may stand still for longer than usual.
            "patience_ms": 10_000,
            "handoff_wait_s": 20,
            "planner": "load",
        },
    }
    path = os.pathsep.join(filter(None, paths))
    return {"connector": connector, "env": {FOLDER_VARIABLE: str(notes), "PYTHONPATH": path}}


def _stock(*_: object) -> dict[str, Any]:
    """Of an engine that hands over by vLLM's own connector."""
    connector = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "fail",
        # Eight processes poll on two cores: a transfer takes seconds, and may take a minute.
        "kv_connector_extra_config": {"kv_lease_duration": int(NIXL_LEASE_S)},
    }
    port = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    return {"connector": connector, "env": port | SPINNING}


def _rank_files() -> set[str]:
    """What ranks keep in shared memory while they run."""
    return {name for name in os.listdir("/dev/shm") if is_rank_file(name)}


def _socket(folder: Path) -> str:
    return str(folder / "kvkeep.sock")


@contextlib.contextmanager
def running_fleet(
    folder: Path,
    model: str,
    sizes: Mapping[str, int],
    block_tokens: int,
    transport: PoolTransport | NixlTransport | None = None,
) -> Iterator[Fleet]:
    """Engines in the exact mode, in which a hit and a computation of equal ranks give equal bits.

    Args:
        folder: Empty.
        model: As a stack file names it.
        sizes: Tensor-parallel size by the engine's name.
        block_tokens: Of all engines.
        transport: By which they hand over; through the pool by default.
    """
    transport = transport or PoolTransport()
    connected = _watched if isinstance(transport, PoolTransport) else _stock
    values = {
        "model": model,
        "exact": True,
        "start_timeout_s": START_TIMEOUT_S,
        "daemon": {"pool_bytes": "256MiB", "socket": _socket(folder)},
        "engines": [
            _engine(name, size, block_tokens) | connected(folder, name)
            for name, size in sizes.items()
        ],
    }
    file = folder / "stack.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    prompts = make_prompts(block_tokens, seed=block_tokens)
    before = _rank_files()
    with Stack(load_spec(file), state_dir=folder / "state") as stack:
        if isinstance(transport, NixlTransport):
            for name, size in sizes.items():
                give_back(stack.engines[name], _cores(name, size))
        yield Fleet(stack, folder, block_tokens, sizes, prompts, transport)
    assert _rank_files() <= before


# ---- what a pair must show


def check_pair(fleet: Fleet, prefill: str, decode: str) -> float:
    """Hand every prompt from one engine to the other, and look at all that can be seen of it.

    Returns:
        The worst difference of a first token from what the decode engine answers alone, in nats.
    """
    is_same_size = fleet.sizes[prefill] == fleet.sizes[decode]
    worst = 0.0
    for prompt, alone in zip(fleet.prompts, fleet.cold(decode), strict=True):
        before = fleet.held(decode, "loaded").keys()
        salt = fleet.salt()
        offered = fleet.offer(prefill, prompt, salt)
        answered = fleet.take(decode, prompt, salt, offered)

        num_whole = (len(prompt) - 1) // fleet.block_tokens
        assert (
            offered.params["kvkeep"]["tokens"]
            == len(prompt) // fleet.block_tokens * fleet.block_tokens
        )
        assert answered.num_cached == num_whole * fleet.block_tokens
        assert answered.num_computed <= fleet.block_tokens
        check_bytes(fleet, prefill, decode, before, num_whole)
        worst = max(worst, difference(alone, answered))
        if is_same_size:
            assert answered.top == alone.top
    assert worst <= TIMES_THE_FLOOR * fleet.floor()
    return worst


def check_bytes(fleet: Fleet, prefill: str, decode: str, before: Set[str], num_blocks: int) -> None:
    """What the decode engine's ranks hold of the blocks it has just loaded is what others wrote."""
    stored, loaded = fleet.held(prefill, "stored"), fleet.held(decode, "loaded")
    new = loaded.keys() - before
    assert len(new) == num_blocks > 0
    assert {block: loaded[block] for block in new} == {block: stored[block] for block in new}


def check_swapped_head(fleet: Fleet, prefill: str, decode: str) -> float:
    """Swap two heads of one layer on the way: bytes and answers both tell.

    Returns:
        The worst difference of a first token from what the decode engine answers alone, in nats.
    """
    fleet.cold(prefill)
    last = len(fleet.held(prefill, "stored").popitem()[1][0]) - 1
    worst = 0.0
    for prompt, alone in zip(fleet.prompts, fleet.cold(decode), strict=True):
        before = fleet.held(prefill, "stored").keys()
        salt = fleet.salt()
        offered = fleet.offer(prefill, prompt, salt)
        num_stored = offered.params["kvkeep"]["tokens"] // fleet.block_tokens
        new = _stored_since(fleet, prefill, before, num_stored)
        fleet.swap_heads(list(new), layer=1, one=0, other=last)
        answered = fleet.take(decode, prompt, salt, offered)

        assert answered.num_computed <= fleet.block_tokens
        loaded = fleet.held(decode, "loaded")
        found = [_differing(new[block], loaded[block]) for block in new.keys() & loaded.keys()]
        assert found == [[(1, 0), (1, last)]] * (answered.num_cached // fleet.block_tokens)
        worst = max(worst, difference(alone, answered))
    assert worst > TIMES_THE_FLOOR * fleet.floor()
    return worst


def _stored_since(
    fleet: Fleet, engine: str, before: Set[str], num_blocks: int
) -> Mapping[str, Pages]:
    """Wait until every rank of an engine has noted so many further blocks."""
    found: dict[str, Pages] = {}

    def are_stored() -> bool:
        found.update(fleet.held(engine, "stored"))
        return len(found.keys() - before) == num_blocks

    wait_until(are_stored, "every rank has stored", REQUEST_TIMEOUT_S)
    return {block: found[block] for block in found.keys() - before}


def _differing(one: Pages, other: Pages) -> list[tuple[int, int]]:
    """Layer and head of every page that differs."""
    return [
        (layer, head)
        for layer, (mine, theirs) in enumerate(zip(one, other, strict=True))
        for head, (page, another) in enumerate(zip(mine, theirs, strict=True))
        if page != another
    ]
