"""What a pair of engines gives that one of them gives too, and how long its users wait.

SmolLM2-135M in float32, one core for each engine, each transport in a stack of its own. Sixty
requests of 5 to 3,000 tokens, chats and completions, streamed and not, are compared with what the
decode engine answers by itself. Then long prompts that share no beginning are asked both ways in
turns; what the decode engine computed of one that was handed over is read off its own counters.
At last a stream is written while other prompts arrive: what disaggregation is for.

    python -m benchmarks.handoff [--transports pool,nixl] [--prompts 5]
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Figure, Target, emit, median_figure
from benchmarks.handoff.measuring import Measured, measure_times
from benchmarks.ratios import ratio_figure
from kvkeep.model.errors import InputError, KvkeepError
from tests.e2e.pairs import BLOCK_TOKENS, Pair, Transport, running_pair
from tests.e2e.sixty import Sixty, ask_sixty

TRANSPORTS: tuple[Transport, ...] = ("pool", "nixl")
SINGLE = "the decode engine by itself"
KIB = 1024.0
OK, BROKEN, BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="benchmarks.handoff", description=__doc__.split("\n")[0])
    parser.add_argument("--transports", default=",".join(TRANSPORTS))
    parser.add_argument("--prompts", default=5, type=int, help="long ones, of each transport")
    parser.add_argument("--logs", type=Path, help="folder to keep logs in")
    asked = parser.parse_args(argv)
    names = asked.transports.split(",")
    if asked.prompts < 1 or not set(names) <= set(TRANSPORTS):
        parser.error(f"give at least one prompt, and transports of {', '.join(TRANSPORTS)}")
    # Told to stop, this leaves no server and no pool behind, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(BROKEN))
    status = OK
    for transport in (each for each in TRANSPORTS if each in names):
        try:
            with tempfile.TemporaryDirectory(prefix="kvkeep-handoff-") as scratch:
                folder = Path(asked.logs or scratch) / transport
                folder.mkdir(parents=True, exist_ok=True)
                with running_pair(transport, folder) as pair:
                    run(f"handoff.{transport}", pair, asked.prompts)
        except InputError as error:
            print(f"handoff: {error}", file=sys.stderr)
            return BAD_INPUT
        except KvkeepError as error:
            print(f"handoff: {transport} is left out: {error}", file=sys.stderr, flush=True)
            status = BROKEN
    return status


def run(name: str, pair: Pair, num_prompts: int) -> None:
    """Print what is equal, then what is fast: the second means nothing without the first."""
    print_sixty(name, ask_sixty(pair))
    print_times(name, measure_times(pair, num_prompts))


def print_sixty(name: str, found: Sixty) -> None:
    """Print what a pair's answers are worth, and what it moved for them."""
    reasons = [f"{what}: {why}" for what, why in found.differing]
    _print_equal(f"{name}.answers_identical_or_near_tie", len(found.answers), reasons)
    emit(
        Figure(
            f"{name}.blocks_moved",
            found.num_loaded // BLOCK_TOKENS,
            "blocks",
            target=Target("value", ">=", 1),
            samples=len(found.handed),
        )
    )


def _print_equal(name: str, num_asked: int, reasons: Sequence[str]) -> None:
    emit(
        Figure(
            name,
            num_asked - len(reasons),
            "requests",
            peer=num_asked,
            peer_name="asked",
            target=Target("ratio", ">=", 1),
            samples=num_asked,
        )
    )
    for reason in reasons:
        print(f"{name}: {reason}", file=sys.stderr)


def print_times(name: str, found: Measured) -> None:
    """Print how long prompts went, asked of the pair and of its decode engine."""
    _print_equal(f"{name}.long_answers_identical_or_near_tie", len(found.handed_s), found.differing)
    emit(
        Figure(
            f"{name}.decode_computed",
            max(found.computed_tokens),
            "tokens",
            peer=max(found.prompt_tokens),
            peer_name="tokens of the prompt",
            target=Target("value", "<=", BLOCK_TOKENS),
            spread=(min(found.computed_tokens), max(found.computed_tokens)),
            samples=len(found.computed_tokens),
        )
    )
    moved = [
        size / tokens / KIB
        for size, tokens in zip(found.bytes_moved, found.prompt_tokens, strict=True)
    ]
    emit(median_figure(f"{name}.moved_per_token", moved, "KiB"))
    emit(
        ratio_figure(
            f"{name}.ttft", [found.handed_s], [found.single_s], SINGLE, is_quiet=found.is_quiet
        )
    )
    added = [1e3 * (mine - its) for mine, its in zip(found.handed_s, found.single_s, strict=True)]
    emit(median_figure(f"{name}.ttft_added", added, "ms"))
    emit(
        Figure(
            f"{name}.longest_gap_beside_prompts",
            1e3 * found.gap_handed_s,
            "ms",
            peer=1e3 * found.gap_single_s,
            peer_name="prompts computed by the engine of the stream",
            samples=1,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
