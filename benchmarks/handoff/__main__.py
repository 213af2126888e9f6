"""How long a user waits for the first token when one engine computes and another answers.

SmolLM2-135M, bf16, one core for each engine, prompts of 3,000 tokens that share no beginning. Each
is asked of the router, which hands it over, and then, with the decode engine's cache emptied and
under another salt, of the decode engine by itself. What the decode engine computed of a prompt
that was handed over is read off its own counters. Then one long answer is written while other
prompts arrive: what disaggregation is for.

    python -m benchmarks.handoff [--transports pool,nixl] [--prompts 6]
"""

from __future__ import annotations

import argparse
import secrets
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import Figure, Target, emit, median_figure
from benchmarks.handoff.pairs import Pair, pair
from benchmarks.peers.engines import BLOCK_TOKENS, Engine, EngineError
from benchmarks.peers.rounds import compare
from benchmarks.quiet import BUSY_SHARE_MAX, foreign_share, read_cpu
from benchmarks.ratios import ratio_figure
from kvkeep.model.errors import KvkeepError
from kvkeep.stack.models import resolve_model
from kvkeep.validate.prompts import load_play

PLAY = "king_lear"
TRANSPORTS = ("pool", "nixl")
PROMPT_TOKENS = 3000
ANSWER_TOKENS = 8
WARMING_PROMPTS = 2
"""The first hand-off opens connections and touches memory for the first time."""
STREAM_TOKENS = 192
NUM_INTRUDERS = 3
KIB = 1024.0
OK, BROKEN, BAD_INPUT = 0, 1, 2


@dataclass
class Measured:
    """What prompts of one transport took, in seconds, and what they moved."""

    handed_s: list[float] = field(default_factory=list)
    single_s: list[float] = field(default_factory=list)
    computed_tokens: list[float] = field(default_factory=list)
    """By the decode engine, of prompts that were handed over."""
    bytes_moved: list[float] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    gaps_handed_s: list[float] = field(default_factory=list)
    """Longest pauses of a stream while other prompts arrive at the router."""
    gaps_single_s: list[float] = field(default_factory=list)
    """The same while they arrive at the engine that writes the stream."""
    is_quiet: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="benchmarks.handoff", description=__doc__.split("\n")[0])
    parser.add_argument("--transports", default=",".join(TRANSPORTS))
    parser.add_argument("--prompts", default=6, type=int, help="of each transport (default 6)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--logs", type=Path, help="folder to keep logs in")
    asked = parser.parse_args(argv)
    transports = asked.transports.split(",")
    if asked.prompts < 1 or not set(transports) <= set(TRANSPORTS):
        parser.error(f"give at least one prompt, and transports of {', '.join(TRANSPORTS)}")
    # Told to stop, this leaves no server and no pool behind, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(BROKEN))
    try:
        model = Path(resolve_model(asked.model).location)
    except KvkeepError as error:
        print(f"handoff: {error}", file=sys.stderr)
        return BAD_INPUT
    status = OK
    for transport in transports:
        try:
            with tempfile.TemporaryDirectory(prefix="kvkeep-handoff-") as scratch:
                folder = Path(asked.logs or scratch) / transport
                folder.mkdir(parents=True, exist_ok=True)
                with pair(transport, model, folder) as running:
                    print_figures(transport, measure(running, asked.prompts))
        except EngineError as error:
            print(f"handoff: {transport} is left out: {error}", file=sys.stderr, flush=True)
            status = BROKEN
    return status


def measure(running: Pair, num_prompts: int) -> Measured:
    """Ask every prompt both ways, then let prompts arrive beside a stream."""
    found = Measured()
    before = read_cpu()
    prompts = _cut_prompts(running.decode, num_prompts + WARMING_PROMPTS + 2 * NUM_INTRUDERS + 2)
    for idx in range(num_prompts + WARMING_PROMPTS):
        _ask_both_ways(running, prompts.pop(), Measured() if idx < WARMING_PROMPTS else found)
    for asked, gaps in (
        (running.router, found.gaps_handed_s),
        (running.decode, found.gaps_single_s),
    ):
        intruders = [prompts.pop() for _ in range(NUM_INTRUDERS)]
        gaps.append(_longest_gap_s(running.decode, prompts.pop(), asked, intruders))
    found.is_quiet = foreign_share(before, read_cpu()) <= BUSY_SHARE_MAX
    return found


def _cut_prompts(engine: Engine, count: int) -> list[str]:
    text = load_play(PLAY)
    # Four characters a token is what English text takes; six leave room.
    part_chars = 6 * PROMPT_TOKENS
    step = (len(text) - part_chars) // count
    parts = [text[step * i : step * i + part_chars] for i in range(count)]
    return [engine.prompt_of(part, PROMPT_TOKENS) for part in parts]


def _ask_both_ways(running: Pair, prompt: str, found: Measured) -> None:
    moved, hits = running.bytes_moved(), _hits(running.decode)
    handed = running.router.complete(prompt, max_tokens=ANSWER_TOKENS, logprobs=5)
    found.handed_s.append(handed.first_token_s)
    found.computed_tokens.append(handed.prompt_tokens - (_hits(running.decode) - hits))
    found.bytes_moved.append(running.bytes_moved() - moved)
    running.decode.reset_prefix_cache()
    single = running.decode.complete(
        prompt, max_tokens=ANSWER_TOKENS, logprobs=5, salt=secrets.token_hex(8)
    )
    found.single_s.append(single.first_token_s)
    found.verdicts.append(compare(single, handed))


def _hits(engine: Engine) -> float:
    counters = engine.counters()
    return counters["local_hits"] + counters["external_hits"]


def _longest_gap_s(engine: Engine, prompt: str, asked: Engine, intruders: Sequence[str]) -> float:
    """Longest pause of a stream on ``engine`` while prompts are asked one after the other."""
    has_begun = threading.Event()
    rest = iter(intruders)

    def ask() -> None:
        has_begun.wait()
        for intruder in rest:
            asked.complete(intruder, max_tokens=1)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        answer = engine.complete(prompt, max_tokens=STREAM_TOKENS, begun=has_begun.set)
    finally:
        has_begun.set()
        asking.join()
    return max(answer.gaps_s)


def print_figures(transport: str, found: Measured) -> None:
    """Print every figure of one transport."""
    name = f"handoff.{transport}"
    emit(
        ratio_figure(
            f"{name}.ttft",
            [found.handed_s],
            [found.single_s],
            "the decode engine by itself",
            is_quiet=found.is_quiet,
        )
    )
    emit(
        median_figure(
            f"{name}.ttft_added",
            [1e3 * (mine - its) for mine, its in zip(found.handed_s, found.single_s, strict=True)],
            "ms",
        )
    )
    emit(
        Figure(
            f"{name}.decode_computed",
            max(found.computed_tokens),
            "tokens",
            target=Target("value", "<=", BLOCK_TOKENS),
            spread=(min(found.computed_tokens), max(found.computed_tokens)),
            samples=len(found.computed_tokens),
        )
    )
    moved = [size / PROMPT_TOKENS / KIB for size in found.bytes_moved]
    emit(median_figure(f"{name}.moved_per_token", moved, "KiB"))
    equal = [verdict == "equal" or verdict.startswith("near tie") for verdict in found.verdicts]
    emit(
        Figure(
            f"{name}.answers_equal",
            statistics.fmean(equal),
            "share",
            target=Target("value", ">=", 1),
            samples=len(equal),
        )
    )
    emit(
        ratio_figure(
            f"{name}.longest_gap_beside_prompts",
            [found.gaps_handed_s],
            [found.gaps_single_s],
            "prompts computed by the engine of the stream",
            is_quiet=found.is_quiet,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
