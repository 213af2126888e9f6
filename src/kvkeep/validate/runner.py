"""Runs phases: prompts in order, with counters read around each of them.

One request at a time unless a suite is about several: the share a cache served can then be told
from counters, and the engine's batches have the same shape in every phase.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvkeep.validate.answer import Answer, Prompt
from kvkeep.validate.counters import Counters, Servable, read_counters, servable_tokens
from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.verdict import Judgement, Verdict

SETTLE_READINGS_MAX = 100
SETTLE_PAUSE_S = 0.1
"""Counters trail the answers: vLLM counts after it answered, and stores run behind. Two equal
readings this far apart end the wait; 10 s at most, far above the slowest store seen."""
PATIENT_REQUESTS = 3
"""So many at a time may wait as long as one; more of them wait for each other, and longer."""
SERVED_SHARE_MIN = 0.8
"""Below this share a replay proves too little about the cache."""

SaltOf = Callable[[int, Prompt], str | None]
"""Cache salt of the i-th request of a phase."""


class Progress(Protocol):
    """Told how far a run is."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` requests of ``phase`` have been answered."""


def no_progress(phase: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One pass over prompts and what the counters did meanwhile."""

    name: str
    prompts: tuple[Prompt, ...]
    answers: tuple[Answer, ...]
    """One per prompt, in the same order."""
    delta: Counters
    wall_s: float

    def servable(self, block_tokens: int | None) -> Servable | None:
        """What could have been served; None if tokens or the block size are unknown."""
        # A failed answer says nothing about its prompt; it is counted as an error elsewhere.
        known = [a.prompt_token_ids for a in self.answers if a.prompt_token_ids is not None]
        if block_tokens is None or not known:
            return None
        return servable_tokens(known, block_tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the answers."""
        return {
            "name": self.name,
            "requests": len(self.answers),
            "errors": sum(answer.error is not None for answer in self.answers),
            "wall_s": self.wall_s,
            "ttft_s_median": median_ttft_s(self.answers),
            "counters": self.delta.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of a suite that is not about a single answer."""

    name: str
    ok: bool | None
    """None: could not be checked here, ``detail`` says why."""
    detail: str
    gate: bool = False
    """Failing means that the path under test did not run, not that it is wrong."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "gate": self.gate}


@dataclass(frozen=True, slots=True)
class Judged:
    """One request with its verdict and both answers."""

    phase: str
    prompt: Prompt
    index: int
    """Position in the phase, 0-based."""
    judgement: Judgement
    reference: Answer
    candidate: Answer

    def to_dict(self) -> dict[str, Any]:
        """JSON form with all evidence."""
        return {
            "phase": self.phase,
            "prompt_id": self.prompt.prompt_id,
            "kind": self.prompt.kind,
            "index": self.index,
            **self.judgement.to_dict(),
            "reference": self.reference.to_dict(),
            "candidate": self.candidate.to_dict(),
        }


@dataclass(slots=True)
class Watch:
    """Reads the counters of one engine and its daemon, and keeps every reading."""

    engine: Endpoint
    daemon: Endpoint | None = None
    front: Endpoint | None = None
    """Who is asked instead of the engine itself: a router before it."""
    beside: Callable[[], AbstractAsyncContextManager[object]] = nullcontext
    """What goes on while requests of a phase are under way, such as a flood of others."""
    readings: list[Counters] = field(default_factory=list)

    @property
    def asked(self) -> Endpoint:
        """Where requests are sent."""
        return self.front or self.engine

    async def read_settled(self) -> Counters:
        """Read until two readings in a row agree, or `SETTLE_READINGS_MAX` were taken."""
        reading = await self._read()
        for _ in range(SETTLE_READINGS_MAX):
            await asyncio.sleep(SETTLE_PAUSE_S)
            before, reading = reading, await self._read()
            if before == reading:
                break
        return reading

    async def _read(self) -> Counters:
        reading = await read_counters(self.engine, self.daemon)
        self.readings.append(reading)
        return reading


async def run_phase(
    name: str,
    watch: Watch,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    salt_of: SaltOf,
    progress: Progress = no_progress,
    in_flight: int = 1,
) -> Phase:
    """Ask every prompt once, in order.

    Args:
        name: Of the phase.
        watch: Who is asked, and whose counters are read.
        prompts: What is asked.
        sampling: Length and seed of answers.
        salt_of: Salt of each request.
        progress: Told about every answer.
        in_flight: Requests under way at a time; the next is sent when one has its answer.

    Raises:
        UnavailableError: The daemon's counters can't be read. What the engine does wrong is in the
            answers instead.
    """
    before = await watch.read_settled()
    began_s = time.perf_counter()
    answers: dict[int, Answer] = {}
    upcoming = iter(enumerate(prompts))

    async def ask_on() -> None:
        for i, prompt in upcoming:
            answers[i] = await watch.asked.chat(prompt.text, sampling, salt=salt_of(i, prompt))
            progress(name, len(answers), len(prompts))

    async with watch.beside(), asyncio.TaskGroup() as group:
        watch.asked.patience = max(1.0, in_flight / PATIENT_REQUESTS)
        for _ in range(max(1, min(in_flight, len(prompts)))):
            group.create_task(ask_on())
    wall_s = time.perf_counter() - began_s
    after = await watch.read_settled()
    in_order = tuple(answers[i] for i in range(len(prompts)))
    return Phase(name, tuple(prompts), in_order, after.since(before), wall_s)


@dataclass(frozen=True, slots=True)
class Served:
    """Where the prompt tokens of a replay came from."""

    external_tokens: int
    """From outside the engine."""
    local_tokens: int
    """From the engine's own prefix cache; apart, since it says nothing about kvkeep."""
    servable_external_tokens: int | None
    """What the outside could have served: whole blocks asked for the first time."""
    servable_local_tokens: int | None
    """What the engine itself could serve: whole blocks asked for again within the replay."""

    @property
    def share(self) -> float | None:
        """External tokens over servable ones; None if unknown or nothing was servable."""
        if not self.servable_external_tokens:
            return None
        return self.external_tokens / self.servable_external_tokens

    def why_not_exercised(self) -> str | None:
        """Say why the replay proves nothing, or None if it does."""
        share = self.share
        if self.servable_external_tokens is None:
            return "The server does not say enough (prompt token ids, block size) to tell."
        if share is None:
            return "No prompt is longer than one block, so nothing could be served."
        if share < SERVED_SHARE_MIN:
            return (
                f"Only {self.external_tokens} of {self.servable_external_tokens} servable prompt "
                f"tokens came from outside the engine ({share:.0%}; {SERVED_SHARE_MIN:.0%} needed)."
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "external_tokens": self.external_tokens,
            "local_tokens": self.local_tokens,
            "servable_external_tokens": self.servable_external_tokens,
            "servable_local_tokens": self.servable_local_tokens,
            "share": self.share,
            "share_min": SERVED_SHARE_MIN,
        }


def served_in(phase: Phase, block_tokens: int | None) -> Served:
    """Work out where a phase's prompt tokens came from."""
    servable = phase.servable(block_tokens)
    return Served(
        phase.delta.external_hit_tokens,
        phase.delta.local_hit_tokens,
        servable.external_tokens if servable else None,
        servable.local_tokens if servable else None,
    )


def count_verdicts(judged: Sequence[Judged]) -> dict[str, int]:
    """Number of requests per verdict, every verdict named."""
    verdicts = [item.judgement.verdict for item in judged]
    return {verdict.value: verdicts.count(verdict) for verdict in Verdict}


def median_ttft_s(answers: Sequence[Answer]) -> float | None:
    """Median time to first token in seconds; None if no answer has one."""
    known = [answer.ttft_s for answer in answers if answer.ttft_s is not None]
    return statistics.median(known) if known else None
