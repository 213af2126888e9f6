"""The KV of an engine without a model: blocks that carry what they were computed from.

A wrong block shows in the answer the way it would in a model: a flipped bit changes the tokens, a
swapped block makes it say another passage's code word. Pure; nothing here knows of HTTP.
"""

import hashlib
import itertools
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SECRET = re.compile(r"code word of this passage is (\S+?)\.(?:\s|$)")
_COMMON_WORDS = (
    "the and of to in a that is was he for it with as his on be at by had not are but from or "
    "have an they which one you were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time"
)
VOCABULARY = tuple(_COMMON_WORDS.split())
SECRET_WORD = re.compile(r"[a-z]+-[a-z]+-\d+\.?$")
NUM_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class KvBlock:
    """The KV of one block: what it was computed from, and bits that depend on all before it."""

    words: tuple[str, ...]
    bits: bytes


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong; every count is of requests or blocks, 0 for never."""

    flip_every: int = 0
    """Each n-th block loaded from outside has one bit flipped."""
    swap: bool = False
    """A block loaded from outside that holds a code word is replaced by another such block."""
    empty_every: int = 0
    """Each n-th answer is ``[DONE]`` without text and without a finish reason."""
    fail_every: int = 0
    """Each n-th request is answered with HTTP 500."""
    cut_every: int = 0
    """Each n-th stream ends in the middle."""
    reset_lies: bool = False
    """A reset says it succeeded and clears nothing."""
    reset_refusals: int = 0
    """So many resets are refused before one succeeds; -1 refuses always."""
    counters_fall: bool = False
    """The hit counter is set back by a reset."""


class FakeStore:
    """KV outside the engines, with a kvkeep daemon's counters; several engines may share it."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, KvBlock] = {}
        names = "blocks_stored blocks_loaded load_failures device_to_host host_to_device"
        self.counters: dict[str, int] = dict.fromkeys(names.split(), 0)

    def store(self, key: bytes, block: KvBlock) -> None:
        """Keep a block; one that is there already is not counted again."""
        if key not in self.blocks:
            self.blocks[key] = block
            self.counters["blocks_stored"] += 1
            self.counters["device_to_host"] += 1

    def load(self, key: bytes, faults: Faults) -> KvBlock | None:
        """Give a block back, or None; wrong where the faults say so."""
        block = self.blocks.get(key)
        if block is None:
            return None
        self.counters["blocks_loaded"] += 1
        self.counters["host_to_device"] += 1
        count = self.counters["blocks_loaded"]
        if faults.flip_every and count % faults.flip_every == 0:
            return KvBlock(block.words, bytes([block.bits[0] ^ 1]) + block.bits[1:])
        if faults.swap and _has_secret(block):
            others = (b for b in self.blocks.values() if b.words != block.words)
            return next((b for b in others if _has_secret(b)), block)
        return block


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token with its alternatives, best first."""

    word: str
    top: tuple[tuple[str, float], ...]


def token_id(word: str) -> int:
    """The id of a word."""
    return zlib.crc32(word.encode()) % 49_152


class FakeKv:
    """An engine's prefix cache, its outside store, its counters, and answers made of KV."""

    def __init__(
        self,
        *,
        store: FakeStore | None = None,
        block_tokens: int = 16,
        num_blocks: int = 10_000,
        reuse_noise_nats: float = 0.0,
        faults: Faults | None = None,
    ) -> None:
        """Start empty.

        Args:
            store: Where blocks go and come from; None is an engine alone.
            block_tokens: Words per block.
            num_blocks: Size of its own cache; the least recently used block goes first.
            reuse_noise_nats: How far reused KV moves logprobs, as another order of additions does.
            faults: What goes wrong.
        """
        self.block_tokens, self.num_blocks = block_tokens, num_blocks
        self.store, self.faults = store, faults or Faults()
        self.reuse_noise_nats = reuse_noise_nats
        self.cache: OrderedDict[bytes, KvBlock] = OrderedDict()
        names = ("prefix_cache", "external_prefix_cache")
        self.counters = {f"{n}_{what}": 0 for n in names for what in ("queries", "hits")}

    def prefill(self, words: Sequence[str], salt: str = "") -> tuple[list[KvBlock], int, int]:
        """Bring a prompt's whole blocks together.

        Returns:
            The blocks, tokens found in the own cache, and tokens loaded from outside.
        """
        blocks: list[KvBlock] = []
        n, local, external = self.block_tokens, 0, 0
        key, bits, reusable = salt.encode(), b"", True
        for start in range(0, (len(words) - 1) // n * n, n):
            piece = tuple(words[start : start + n])
            key = hashlib.blake2b(key + "\0".join(piece).encode(), digest_size=16).digest()
            block = self.cache.get(key) if reusable and not external else None
            if block is not None:
                local += n
                self.cache.move_to_end(key)
            elif reusable and self.store and (block := self.store.load(key, self.faults)):
                external += n
            if block is None:
                reusable = False
                digest = hashlib.blake2b(bits + "\0".join(piece).encode(), digest_size=8)
                block = KvBlock(piece, digest.digest())
            self._keep(key, block)
            blocks.append(block)
            bits = block.bits
        self.counters["prefix_cache_queries"] += len(words)
        self.counters["prefix_cache_hits"] += local
        if self.store is not None:
            self.counters["external_prefix_cache_queries"] += len(words) - local
            self.counters["external_prefix_cache_hits"] += external
        return blocks, local, external

    def _keep(self, key: bytes, block: KvBlock) -> None:
        self.cache[key] = block
        if self.store is not None:
            self.store.store(key, block)
        while len(self.cache) > self.num_blocks:
            self.cache.popitem(last=False)

    def generate(
        self, words: Sequence[str], blocks: Sequence[KvBlock], max_tokens: int, *, reused: bool
    ) -> Iterator[Token]:
        """Answer from KV: the code word it holds, then words that follow from its bits."""
        tail = words[len(blocks) * self.block_tokens :]
        seen = " ".join([*itertools.chain.from_iterable(b.words for b in blocks), *tail])
        state = hashlib.blake2b(b"".join(b.bits for b in blocks) + " ".join(tail).encode())
        found = SECRET.search(seen)
        said = ["The", "code", "word", "is", f"{found.group(1)}."] if found else []
        for position in range(max_tokens):
            step = state.copy()
            step.update(position.to_bytes(4, "little"))
            token = self._choose(step.digest(), said[position : position + 1], reused)
            state.update(token.word.encode())
            yield token

    def _choose(self, digest: bytes, forced: Sequence[str], reused: bool) -> Token:
        """Rank words by the state's bits; reuse moves each of them a little."""
        start = digest[0] % len(VOCABULARY)
        ranked = [
            VOCABULARY[(start + i) % len(VOCABULARY)]
            for i in range(min(NUM_ALTERNATIVES, len(VOCABULARY)))
        ]
        logprobs = [-0.4 - 0.9 * i for i in range(len(ranked))]
        # One position in eight is a near-tie between the two best words.
        logprobs[1] = logprobs[0] - (0.02 if digest[1] % 8 == 0 else 0.5 + digest[2] / 256)
        if forced:
            ranked, logprobs = [*forced, *ranked[1:]], [-0.01, *(x - 4 for x in logprobs[1:])]
        if reused and self.reuse_noise_nats:
            logprobs = [
                x + self.reuse_noise_nats * (digest[3 + i] / 127.5 - 1)
                for i, x in enumerate(logprobs)
            ]
        top = sorted(zip(ranked, logprobs, strict=True), key=lambda pair: -pair[1])
        return Token(top[0][0], tuple(top))


def _has_secret(block: KvBlock) -> bool:
    return any(SECRET_WORD.match(word) for word in block.words)
