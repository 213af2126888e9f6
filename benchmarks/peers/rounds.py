"""One round of one subject: a fresh engine, its answers compared, its times taken in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.peers.engines import Answer, Engine, EngineError
from benchmarks.quiet import BUSY_SHARE_MAX, CpuReading, foreign_share, read_cpu

PROMPT_TOKENS = 3500
COLD_REPETITIONS = 3
WARMING_PAIRS = 2
ANSWER_TOKENS = 16
SETTLE_TIMEOUT_S = 60.0
TRIES_PER_REPETITION = 5
QUIET_REPETITIONS_MIN = 3
"""With fewer undisturbed ones than this the disturbed ones are shown too."""
PAUSE_S = 0.5
"""After a disturbed repetition: neighbours come in bursts."""
NEAR_TIE_LOGPROB = 0.5
"""Two candidates closer than this may change places with the shape of a bf16 batch; seen: 0.36."""


@dataclass
class Round:
    """What one round saw; times in seconds."""

    cold_s: list[float] = field(default_factory=list)
    on_engine_s: list[float] = field(default_factory=list)
    loaded_s: list[float] = field(default_factory=list)
    """Only of requests that the counters prove to be loads."""
    served_shares: list[float] = field(default_factory=list)
    """Of the prompt's tokens, per reset."""
    num_resets: int = 0
    num_proven: int = 0
    """Resets after which the counters prove a load."""
    equal_answers: list[bool] = field(default_factory=list)
    """Per comparison of a loaded answer with the one from the engine's own blocks: exact."""
    cold_verdict: str = ""
    """How the loaded answer compares with the computed one."""
    num_disturbed: int = 0
    """Repetitions whose times were dropped because other work took part of the processors."""
    is_quiet: bool = True
    """Whether all repetitions wanted were undisturbed."""


@dataclass(frozen=True)
class Proven:
    """A completion with what the engine's counters say of its prompt, in tokens."""

    answer: Answer
    local_hits: float
    external_hits: float

    @property
    def is_load(self) -> bool:
        """Whether nothing came from the engine itself, and something from outside."""
        return self.local_hits == 0 and self.external_hits > 0

    @property
    def served_share(self) -> float:
        """The share of the prompt that was not computed, 0 to 1."""
        return (self.local_hits + self.external_hits) / self.answer.prompt_tokens


def complete_proven(engine: Engine, prompt: str, *, logprobs: int | None = None) -> Proven:
    """Complete a prompt and read what the counters say about it; nothing else may run."""
    before = engine.counters()
    answer = engine.complete(prompt, max_tokens=ANSWER_TOKENS, logprobs=logprobs)
    after = engine.counters()
    return Proven(
        answer,
        local_hits=after["local_hits"] - before["local_hits"],
        external_hits=after["external_hits"] - before["external_hits"],
    )


class Neighbours:
    """What other work does to the processors meanwhile."""

    def read(self) -> CpuReading:
        """Read how much processor time everybody has used."""
        return read_cpu()

    def pause(self) -> None:
        """Wait for a burst of other work to pass."""
        time.sleep(PAUSE_S)


def run_round(
    engine: Engine, text: str, repetitions: int, *, loads: bool, neighbours: Neighbours
) -> Round:
    """Measure one engine.

    Args:
        engine: Freshly started; nobody else uses it.
        text: Where the prompts come from.
        repetitions: Pairs of an on-engine and a loaded request.
        loads: Whether the engine has a connector; without one only cold and on-engine times exist.
        neighbours: Tells which repetitions are worth keeping.
    """
    found = Round()
    prompts = cut_prompts(engine, text, COLD_REPETITIONS + 2)
    engine.complete(prompts[0])  # the first long prompt pays for pages touched the first time
    for prompt in prompts[1:-1]:
        found.cold_s.append(engine.complete(prompt).first_token_s)
    prompt = prompts[-1]
    cold = engine.complete(prompt, max_tokens=ANSWER_TOKENS, logprobs=5)
    if loads:
        settle(engine, prompt, SETTLE_TIMEOUT_S)
        _compare_answers(engine, prompt, cold, found)
    for _ in range(WARMING_PAIRS):
        _run_pair(engine, prompt, Round(), loads=loads)
    _repeat_until_quiet(engine, prompt, found, repetitions, loads=loads, neighbours=neighbours)
    return found


def _repeat_until_quiet(
    engine: Engine,
    prompt: str,
    found: Round,
    repetitions: int,
    *,
    loads: bool,
    neighbours: Neighbours,
) -> None:
    """Take pairs until as many as wanted were undisturbed, or patience ends.

    Whether a pair is dropped depends on what others did, never on its own times. Proofs count
    from all of them.
    """
    disturbed: list[Round] = []
    for _ in range(repetitions * TRIES_PER_REPETITION):
        pair = Round()
        before = neighbours.read()
        _run_pair(engine, prompt, pair, loads=loads)
        is_disturbed = foreign_share(before, neighbours.read()) > BUSY_SHARE_MAX
        _add_proof(pair, found)
        if is_disturbed:
            disturbed.append(pair)
            neighbours.pause()
            continue
        _add_times(pair, found)
        if len(found.on_engine_s) >= repetitions:
            break
    found.num_disturbed = len(disturbed)
    found.is_quiet = len(found.on_engine_s) >= repetitions
    if len(found.on_engine_s) < QUIET_REPETITIONS_MIN:
        for pair in disturbed:
            _add_times(pair, found)


def _add_proof(pair: Round, found: Round) -> None:
    found.num_resets += pair.num_resets
    found.num_proven += pair.num_proven
    found.served_shares += pair.served_shares
    found.equal_answers += pair.equal_answers


def _add_times(pair: Round, found: Round) -> None:
    found.on_engine_s += pair.on_engine_s
    found.loaded_s += pair.loaded_s


def cut_prompts(engine: Engine, text: str, count: int) -> list[str]:
    """Return prompts of PROMPT_TOKENS tokens that share no beginning.

    Raises:
        EngineError: The text is too short.
    """
    # Four characters a token is what English text takes; six leave room.
    part_chars = 6 * PROMPT_TOKENS
    step = max(1, (len(text) - part_chars) // count)
    parts = [text[step * i : step * i + part_chars] for i in range(count)]
    return [engine.prompt_of(part, PROMPT_TOKENS) for part in parts]


def settle(engine: Engine, prompt: str, timeout_s: float) -> None:
    """Wait until a prompt is loaded after a reset, and no more of it than the time before.

    Raises:
        EngineError: It never was; the subject does not work here.
    """
    deadline = time.perf_counter() + timeout_s
    served = 0.0
    while time.perf_counter() < deadline:
        engine.reset_prefix_cache()
        proven = complete_proven(engine, prompt)
        if proven.is_load and proven.served_share <= served:
            return
        served = proven.served_share if proven.is_load else 0.0
    raise EngineError(
        f"nothing was loaded after a reset for {timeout_s:.0f} s; see the engine's log"
    )


def _run_pair(engine: Engine, prompt: str, found: Round, *, loads: bool) -> None:
    kept = complete_proven(engine, prompt)
    if kept.local_hits > 0:
        found.on_engine_s.append(kept.answer.first_token_s)
    if not loads:
        return
    engine.reset_prefix_cache()
    loaded = complete_proven(engine, prompt)
    found.num_resets += 1
    found.served_shares.append(loaded.served_share if loaded.is_load else 0.0)
    found.equal_answers.append(loaded.answer.token_ids == kept.answer.token_ids)
    if loaded.is_load:
        found.num_proven += 1
        found.loaded_s.append(loaded.answer.first_token_s)


def _compare_answers(engine: Engine, prompt: str, cold: Answer, found: Round) -> None:
    """Compare a loaded answer with the one from the engine's own blocks, and with the cold one."""
    kept = complete_proven(engine, prompt, logprobs=5).answer
    engine.reset_prefix_cache()
    loaded = complete_proven(engine, prompt, logprobs=5).answer
    found.equal_answers.append(loaded.token_ids == kept.token_ids)
    found.cold_verdict = compare(cold, loaded)


def compare(expected: Answer, actual: Answer) -> str:
    """Say how two greedy answers relate: `equal`, `near tie at token i`, or `differs at token i`.

    A computed prompt and a loaded one run in batches of different shapes, so bf16 rounds their
    logits differently; where two candidates are nearly as likely, either may come first.
    """
    for position, (left, right) in enumerate(
        zip(expected.token_ids, actual.token_ids, strict=False)
    ):
        if left == right:
            continue
        gaps = [_lead(answer.top_logprobs, position) for answer in (expected, actual)]
        kind = "near tie" if max(gaps) <= NEAR_TIE_LOGPROB else "differs"
        return f"{kind} at token {position}"
    return "equal" if len(expected.token_ids) == len(actual.token_ids) else "differs in length"


def _lead(top: Sequence[Mapping[str, float]], position: int) -> float:
    """Return how far the likeliest candidate leads the next one, in log probability."""
    if position >= len(top) or len(top[position]) < 2:
        return math.inf
    first, second = sorted(top[position].values(), reverse=True)[:2]
    return first - second


@dataclass
class SecondEngineRound:
    """Times on an engine that never computed the prompts, in seconds; pairs by prompt."""

    first_s: list[float] = field(default_factory=list)
    """Its first request for a prompt, proven to be a load."""
    on_engine_s: list[float] = field(default_factory=list)
    """The same prompt again, from its own blocks."""
    woken_s: list[float] = field(default_factory=list)
    """The prompt before, from its own blocks, after as long a pause as the other computed."""
    num_prompts: int = 0
    num_proven: int = 0
    equal_answers: list[bool] = field(default_factory=list)
    num_disturbed: int = 0
    is_quiet: bool = True
    """Whether as many prompts as wanted were undisturbed."""


def run_second_engine(owner: Engine, reader: Engine, text: str, count: int) -> SecondEngineRound:
    """Let one engine compute prompts and another, which shares its store, answer them.

    Args:
        owner: Computes each prompt.
        reader: Never computes one of these prompts.
        text: Where the prompts come from.
        count: Undisturbed prompts wanted; at most twice as many are tried.
    """
    found = SecondEngineRound()
    disturbed: list[tuple[float, float]] = []
    known = ""
    for index, prompt in enumerate(cut_prompts(owner, text, 2 * count + WARMING_PAIRS)):
        owner.complete(prompt)
        owner.reset_prefix_cache()  # true only when no store is in flight
        # The reader sat idle meanwhile, and on a shared machine its first answer after that is
        # slower, loaded or not. Both answers that are compared come from an engine awake.
        woken_s = complete_proven(reader, known).answer.first_token_s if known else 0.0
        known = prompt
        before = read_cpu()
        first = complete_proven(reader, prompt)
        again = [complete_proven(reader, prompt).answer for _ in range(3)]
        is_disturbed = foreign_share(before, read_cpu()) > BUSY_SHARE_MAX
        if index < WARMING_PAIRS:
            continue
        found.num_prompts += 1
        found.num_proven += first.is_load
        found.woken_s.append(woken_s)
        found.equal_answers.append(first.answer.token_ids == again[-1].token_ids)
        times = (first.answer.first_token_s, statistics.median(a.first_token_s for a in again))
        if is_disturbed and first.is_load:
            disturbed.append(times)
        elif first.is_load:
            found.first_s.append(times[0])
            found.on_engine_s.append(times[1])
        if len(found.first_s) >= count:
            break
    found.num_disturbed = len(disturbed)
    found.is_quiet = len(found.first_s) >= count
    if len(found.first_s) < QUIET_REPETITIONS_MIN:
        found.first_s += [times[0] for times in disturbed]
        found.on_engine_s += [times[1] for times in disturbed]
    return found
