"""A stand that is a real stack: daemon, engine and model, started for the self-test alone."""

import contextlib
import itertools
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.hashing import BlockHasher
from kvkeep.model.ids import BlockKey
from kvkeep.stack.precedence import load_spec, make_spec
from kvkeep.stack.progress import Progress
from kvkeep.stack.record import FolderLock
from kvkeep.stack.spec import StackSpec
from kvkeep.stack.supervisor import Stack
from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import documents
from kvkeep.validate.runner import Phase, Watch, run_phase, served_in
from kvkeep.validate.self_test.planting import PlantedPool
from kvkeep.validate.self_test.score import Replay
from kvkeep.validate.subject import Addresses, Subject, open_subject
from kvkeep.validate.verdict import defect_of, judge, noise_floor

SAMPLING = Sampling(max_tokens=8)
WORDS = 80
"""About 150 tokens: some blocks, and a cold prompt in less than a second on two cores."""
FOREIGN_PROMPTS = 1
NOISE_PROMPTS = 8
"""Asked twice, cold, for the noise floor; no other request is judged by its own noise."""
HELD_OUT_PROMPTS = 1000
"""Asked without a fault, each once as long as they last; fewer than the texts have passages."""
HELD_OUT_AT_ONCE = 50
"""Few enough for the engine and for a pool of a gigabyte."""
TIMEOUT_S = 120.0
NAME_CHARS_MAX = 50
"""Of a stack's name, so that one with more behind it is still a name."""


@dataclass(frozen=True, slots=True)
class LiveAddresses:
    """Where the stack listens, and the file its blocks lie in."""

    addresses: Addresses
    pool: str


@dataclass(frozen=True, slots=True)
class PromptSets:
    """Prompts by what they are for; no two are alike."""

    struck: list[Prompt]
    """Faults are planted in their blocks."""
    foreign: list[Prompt]
    """Of somebody else."""
    floor: list[Prompt]
    """The noise floor is measured on them."""
    held_out: list[Prompt]
    """Neither struck nor measured: what fails there is a false alarm."""

    @staticmethod
    def made(num_struck: int, seed: int) -> "PromptSets":
        """Cut them from the shipped plays, the same for the same seed."""
        counts = (num_struck, FOREIGN_PROMPTS, NOISE_PROMPTS, HELD_OUT_PROMPTS)
        upcoming = (each.prompt() for each in documents(sum(counts), WORDS, seed))
        return PromptSets(*(list(itertools.islice(upcoming, count)) for count in counts))


def own_spec(model: str | None, *, exact: bool) -> StackSpec:
    """One engine and a daemon."""
    engine = {
        "name": "a",
        "kv_cache_bytes": 512 << 20,
        "max_model_len": 2048,
        # Every block that is there has to be loaded, however fast the machine computes.
        "connector_settings": {"planner": "load"},
    }
    values: dict[str, Any] = {
        "name": "own",
        "exact": exact,
        "daemon": {"pool_bytes": 1 << 30},
        "engines": [engine],
    }
    return make_spec(values if model is None else {**values, "model": model}, environment={})


def spec_of(path: Path, *, exact: bool) -> StackSpec:
    """The first engine of a stack file and its daemon.

    Raises:
        InputError: Something in it is wrong, or it has no engine or daemon to plant faults in.
    """
    spec = load_spec(path, {"exact": exact})
    engines = [engine for engine in spec.engines if engine.uses_kvkeep]
    if not engines or not spec.daemon.enabled:
        raise InputError(
            f"{path} starts no engine with kvkeep and a daemon of its own, so there is no pool "
            "to plant faults in: give a stack file that does."
        )
    settings = {**engines[0].connector_settings, "planner": "load"}
    first = msgspec.structs.replace(engines[0], connector_settings=settings, on_demand=False)
    return msgspec.structs.replace(spec, engines=[first], router=None)


@contextlib.contextmanager
def started_for_faults(spec: StackSpec, *, quiet: bool) -> Iterator[LiveAddresses]:
    """Start a stack in a folder of its own, so that it is never one that somebody uses.

    Nothing of it is left at the end, but for the logs of a stack that did not start. What one that
    was killed has left goes when the next one of this name starts.

    Raises:
        InputError: It can't run here, did not start, or another self-test runs; says which.
    """
    # Under a name of its own too: by its name the user's stack is found.
    own = msgspec.structs.replace(spec, name=f"{spec.name[:NAME_CHARS_MAX]}-self-test")
    folder = Path(platformdirs.user_state_dir("kvkeep")) / "self-tests" / own.name
    stack = Stack(own, state_dir=folder, progress=Progress(quiet=quiet))
    has_logs = True
    try:
        try:
            stack.start()
        except UnavailableError as error:
            raise InputError(str(error)) from error
        except KeyboardInterrupt:
            has_logs = False
            raise
        has_logs = False
        (engine,) = stack.engines.values()
        addresses = Addresses(engine.url, stack.daemon.metrics_url)
        yield LiveAddresses(addresses, stack.daemon.pool)
    finally:
        stack.stop()
        if not has_logs:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a self-test's folder, unless another one has come to use it."""
    with contextlib.suppress(InputError), FolderLock.taken(folder):
        shutil.rmtree(folder, ignore_errors=True)


class LiveStand:
    """See `Stand`. Prompts are asked one by one, so that counters can be told apart.

    In the exact mode answers are judged against computed ones. Otherwise computed and reused KV
    differ by the order of additions, and reused answers are the reference, as in the suites.
    """

    name = "stack"

    def __init__(self, subject: Subject, pool: PlantedPool, run_id: str, *, exact: bool) -> None:
        self._subject, self._pool, self._run_id = subject, pool, run_id
        self.is_exact = exact
        self.noise_nats = 0.0
        self.num_floor_prompts = 0
        self._held_out: Iterator[Prompt] = iter(())
        self._watch = Watch(subject.engine, subject.daemon)
        self._asked: list[Prompt] = []
        self._references: list[Answer] = []
        self.prompts: list[list[BlockKey]] = []
        self.foreign: list[BlockKey] = []

    @staticmethod
    @contextlib.asynccontextmanager
    async def opened(
        where: LiveAddresses, num_prompts: int, seed: int, *, exact: bool
    ) -> "AsyncIterator[LiveStand]":
        """A stand on a stack that has just been started, filled.

        Raises:
            InputError: The engine can't be exact.
            UnavailableError: It does not answer as it must.
        """
        async with open_subject(where.addresses, timeout_s=TIMEOUT_S, exact=exact) as subject:
            pool = PlantedPool.open(where.pool)
            stand = LiveStand(subject, pool, secrets.token_hex(6), exact=exact)
            await stand._fill(num_prompts, seed)
            yield stand

    async def _fill(self, num_prompts: int, seed: int) -> None:
        sets = PromptSets.made(num_prompts, seed)
        self._asked, self._held_out = sets.struck, itertools.cycle(sets.held_out)
        # Another salt stands for another tenant: its blocks must never be found by these prompts.
        foreign_salt = f"{self._run_id}-foreign"
        foreign = await self._phase("fill foreign", sets.foreign, foreign_salt)
        filled = await self._phase("fill", self._asked, self._run_id)
        _require_usable(foreign, filled)
        self.prompts = [self._keys(answer, self._run_id) for answer in filled.answers]
        self.foreign = [
            key for answer in foreign.answers for key in self._keys(answer, foreign_salt)
        ]
        self._references = list(filled.answers)
        if not self.is_exact:
            self._references = list((await self._phase("reuse", self._asked, self._run_id)).answers)
            await self._measure_noise(sets.floor)

    async def _measure_noise(self, prompts: Sequence[Prompt]) -> None:
        salts = [f"{self._run_id}-{number}" for number in range(2)]
        first, second = [await self._phase("noise", prompts, salt) for salt in salts]
        self.noise_nats = noise_floor(zip(first.answers, second.answers, strict=True))
        self.num_floor_prompts = len(prompts)

    async def _phase(self, name: str, prompts: Sequence[Prompt], salt: str) -> Phase:
        return await run_phase(
            name, self._watch, prompts, SAMPLING, salt_of=lambda _idx, _prompt: salt
        )

    def _keys(self, answer: Answer, salt: str) -> list[BlockKey]:
        """Blocks that a replay loads: whole ones before the prompt's last token."""
        token_ids = answer.prompt_token_ids
        block_tokens = self._subject.capabilities.block_tokens
        if token_ids is None or block_tokens is None:
            raise UnavailableError("The engine does not say how it tokenized a prompt.")
        stored = self._pool.slots()
        num_blocks = (len(token_ids) - 1) // block_tokens
        for namespace in {key.namespace for key in stored}:
            hasher = BlockHasher(namespace, block_tokens, extras={"salt": salt})
            hashes = hasher.extend(token_ids)[:num_blocks]
            keys = [BlockKey(namespace, found) for found in hashes]
            if keys and all(key in stored for key in keys):
                return keys
        raise UnavailableError("Blocks of a prompt that was asked are not in the pool.")

    async def settle(self) -> PlantedPool:
        """Empty the engine's own cache, once nothing is stored any more."""
        await self._watch.read_settled()
        reset = await self._subject.engine.reset_prefix_cache()
        if not reset.ok:
            raise UnavailableError(f"The engine's cache could not be reset: {reset.detail}")
        return self._pool

    async def ask_again(self) -> Replay:
        """Ask every prompt; its KV comes from the pool."""
        phase = await self._phase("replay", self._asked, self._run_id)
        return self._judged(phase, self._references)

    async def ask_held_out(self, num: int) -> Replay:
        """Compute prompts that nobody asked before, and ask them again after a reset."""
        prompts = list(itertools.islice(self._held_out, min(num, HELD_OUT_AT_ONCE)))
        salt = f"{self._run_id}-{secrets.token_hex(4)}"
        phase = await self._phase("held out", prompts, salt)
        _require_usable(phase)
        if not self.is_exact:
            await self.settle()
            phase = await self._phase("held out, reused", prompts, salt)
        await self.settle()
        return self._judged(await self._phase("held out, again", prompts, salt), phase.answers)

    def _judged(self, phase: Phase, references: Sequence[Answer]) -> Replay:
        secrets_known = [secret for prompt in phase.prompts for secret in prompt.secrets]
        judgements = tuple(
            judge(
                reference,
                answer,
                noise_nats=self.noise_nats,
                exact=self.is_exact,
                own_secrets=prompt.secrets,
                known_secrets=secrets_known,
            )
            for prompt, reference, answer in zip(
                phase.prompts, references, phase.answers, strict=True
            )
        )
        served = served_in(phase, self._subject.capabilities.block_tokens)
        refused = phase.delta.daemon.get("blocks_corrupt", 0)
        # Where a block is refused, it and those behind it are computed.
        is_whole = refused > 0 or served.external_tokens == served.servable_external_tokens
        return Replay(judgements, refused, is_whole)


def _require_usable(*phases: Phase) -> None:
    """Refuse to judge by answers that are none.

    Raises:
        UnavailableError: One failed.
    """
    for answer in (answer for phase in phases for answer in phase.answers):
        if (defect := defect_of(answer)) is not None:
            raise UnavailableError(f"A prompt of the self-test could not be computed: {defect}")
