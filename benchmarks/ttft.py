"""How long a user waits for the first token of a long prompt, by where its KV lies.

One 3,500-token prompt (a play), SmolLM2-135M, bf16, block of 32 tokens, all processors: computed,
still on the engine, and after POST /reset_prefix_cache, when it comes from outside; each reset is
proven by the engine's counters. Subjects run one at a time, in rounds of changing order, each with
an engine of its own: kvkeep, vLLM's MooncakeStoreConnector, LMCache, and an engine without any.
Then two engines of one processor each share a store, and the second answers prompts it never saw.

    python -m benchmarks.ttft [--subjects on-engine,kvkeep,mooncake,lmcache] [--rounds 2] [--reps 9]
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import Figure, Target, emit
from benchmarks.peers.engines import EngineError, engine
from benchmarks.peers.environments import PeerInstallError
from benchmarks.peers.rounds import (
    Neighbours,
    Round,
    SecondEngineRound,
    run_round,
    run_second_engine,
)
from benchmarks.peers.subjects import SHARED_SUBJECTS, SUBJECTS
from benchmarks.ratios import IntervalFigure, Rounds, ratio_figure
from kvkeep.model.errors import KvkeepError
from kvkeep.stack.models import resolve_model
from kvkeep.validate.prompts import load_play

OWN = "kvkeep"
DEFAULT_SUBJECTS = "on-engine,kvkeep,mooncake,lmcache"
PLAIN = "on-engine"
PLAY = "king_lear"
ALL_CORES = "0-1"
RESET_OVER_ON_ENGINE = 1.2
RESET_OVER_RECOMPUTE = 1 / 30
RESET_OVER_MOONCAKE = 1.05
SECOND_OVER_ON_ENGINE = 1.3
SERVED_SHARE = 0.98
OK, BROKEN, BAD_INPUT = 0, 1, 2


@dataclass
class Measured:
    """All rounds of one subject."""

    rounds: list[Round] = field(default_factory=list)

    @property
    def cold_s(self) -> Rounds:
        """Times of computing, by round."""
        return [found.cold_s for found in self.rounds]

    @property
    def on_engine_s(self) -> Rounds:
        """Times of prefixes still on the engine, by round."""
        return [found.on_engine_s for found in self.rounds]

    @property
    def loaded_s(self) -> Rounds:
        """Times of loads after a reset, by round; rounds that proved none are left out."""
        return [found.loaded_s for found in self.rounds if found.loaded_s]

    @property
    def is_quiet(self) -> bool:
        """Whether other work left the machine alone in every round."""
        return all(found.is_quiet for found in self.rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 whether or not targets are met."""
    options = _parse(argv)
    # Told to stop, this leaves no server and no pool behind, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(BROKEN))
    text = load_play(PLAY)
    broken: list[str] = []
    try:
        model = Path(resolve_model(options.model).location)
    except KvkeepError as error:
        print(f"ttft: {error}", file=sys.stderr)
        return BAD_INPUT
    print_figures(_measure(options, model, text, broken))
    for name in options.second:
        try:
            print_second_engine(name, _measure_second_engine(name, options, model, text))
        except (EngineError, PeerInstallError) as error:
            _give_up(f"{name}, second engine", error, broken)
    return BROKEN if broken else OK


def _give_up(name: str, error: Exception, broken: list[str]) -> None:
    """Note a subject that does not run here; the others are still worth measuring."""
    broken.append(name)
    print(f"ttft: {name} is left out: {error}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.ttft", description=__doc__.split("\n")[0])
    parser.add_argument("--subjects", default=DEFAULT_SUBJECTS, type=_names(SUBJECTS))
    parser.add_argument("--second", default=OWN, type=_names(SHARED_SUBJECTS))
    parser.add_argument("--rounds", default=2, type=int, help="fresh engines per subject")
    parser.add_argument("--reps", default=9, type=int, help="resets per round")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--logs", type=Path, help="folder to keep logs in")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.reps < 1:
        parser.error("--rounds and --reps must be at least 1")
    return options


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def split(given: str) -> list[str]:
        names = [name for name in given.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no subject {name}; take of {', '.join(known)}")
        return names

    return split


def _measure(
    options: argparse.Namespace, model: Path, text: str, broken: list[str]
) -> dict[str, Measured]:
    measured = {name: Measured() for name in options.subjects}
    for number in range(options.rounds):
        shift = number % max(1, len(options.subjects))
        for name in options.subjects[shift:] + options.subjects[:shift]:
            if name not in measured:
                continue
            try:
                found = _run_subject(name, options, model, text)
            except (EngineError, PeerInstallError) as error:
                _give_up(name, error, broken)
                del measured[name]
                continue
            measured[name].rounds.append(found)
            _say(name, number, found)
    return measured


def _run_subject(name: str, options: argparse.Namespace, model: Path, text: str) -> Round:
    with tempfile.TemporaryDirectory(prefix="kvkeep-ttft-") as scratch:
        folder = Path(options.logs or scratch) / name
        folder.mkdir(parents=True, exist_ok=True)
        with (
            SUBJECTS[name](folder) as served,
            engine(served.spec(model, ALL_CORES), folder / "engine.log") as running,
        ):
            return run_round(
                running, text, options.reps, loads=name != PLAIN, neighbours=Neighbours()
            )


def _measure_second_engine(
    name: str, options: argparse.Namespace, model: Path, text: str
) -> SecondEngineRound:
    with tempfile.TemporaryDirectory(prefix="kvkeep-ttft-") as scratch:
        folder = Path(options.logs or scratch) / f"{name}-second"
        folder.mkdir(parents=True, exist_ok=True)
        with (
            SHARED_SUBJECTS[name](folder) as served,
            engine(served.spec(model, "0"), folder / "owner.log") as owner,
            engine(served.spec(model, "1"), folder / "reader.log") as reader,
        ):
            return run_second_engine(owner, reader, text, options.reps)


def _say(name: str, number: int, found: Round) -> None:
    """Tell a person on standard error how a round went."""
    times = {
        "computed": found.cold_s,
        "on the engine": found.on_engine_s,
        "after reset": found.loaded_s,
    }
    parts = [f"{what} {1e3 * statistics.median(s):.1f} ms" for what, s in times.items() if s]
    if found.cold_verdict:
        parts.append(f"loaded against computed answer: {found.cold_verdict}")
    parts.append(f"{found.num_disturbed} repetitions disturbed by other work")
    print(f"# round {number + 1}, {name}: {'; '.join(parts)}", file=sys.stderr, flush=True)


def print_figures(measured: Mapping[str, Measured]) -> None:
    """Print every figure of single engines."""
    plain = measured.get(PLAIN)
    for name, found in measured.items():
        if plain is not None and name != PLAIN:
            _emit_ratio(f"{name}.recompute", found, found.cold_s, plain.cold_s, "without connector")
            _emit_ratio(
                f"{name}.on_engine",
                found,
                found.on_engine_s,
                plain.on_engine_s,
                "without connector",
            )
        else:
            _emit_times(f"{name}.recompute", found.cold_s)
            _emit_times(f"{name}.on_engine", found.on_engine_s)
        if name != PLAIN:
            _print_proof(name, found)
            _print_reset(name, found, plain or found)
    own = measured.get(OWN)
    for peer, bound in (("mooncake", RESET_OVER_MOONCAKE), ("lmcache", None), ("lmcache-32", None)):
        other = measured.get(peer)
        if own and other and own.loaded_s and other.loaded_s:
            _emit_ratio(f"{OWN}.reset_vs_{peer}", own, own.loaded_s, other.loaded_s,
                        f"{peer} after reset", bound, other.is_quiet)  # fmt: skip


def _print_reset(name: str, found: Measured, plain: Measured) -> None:
    if not found.loaded_s:
        return
    is_own = name == OWN
    _emit_ratio(f"{name}.reset", found, found.loaded_s, found.on_engine_s, "on the engine",
                RESET_OVER_ON_ENGINE if is_own else None)  # fmt: skip
    _emit_ratio(f"{name}.reset_vs_recompute", found, found.loaded_s, plain.cold_s, "recompute",
                RESET_OVER_RECOMPUTE if is_own else None)  # fmt: skip


def _print_proof(name: str, found: Measured) -> None:
    """Print what the times rest on: resets proven by counters, tokens served, answers equal."""
    shares = [share for turn in found.rounds for share in turn.served_shares]
    resets = sum(turn.num_resets for turn in found.rounds)
    proven = sum(turn.num_proven for turn in found.rounds)
    equal = [same for turn in found.rounds for same in turn.equal_answers]
    is_own = name == OWN
    _emit_share(f"{name}.served_share", min(shares, default=0.0), resets,
                SERVED_SHARE if is_own else None)  # fmt: skip
    _emit_share(f"{name}.resets_proven", proven / max(1, resets), resets, 1 if is_own else None)
    _emit_share(f"{name}.answers_equal", sum(equal) / max(1, len(equal)), len(equal),
                1 if is_own else None)  # fmt: skip


def print_second_engine(name: str, found: SecondEngineRound) -> None:
    """Print the figures of an engine that answers what another computed."""
    _emit_share(f"{name}.second_engine_proven", found.num_proven / max(1, found.num_prompts),
                found.num_prompts, 1 if name == OWN else None)  # fmt: skip
    _emit_share(f"{name}.second_engine_answers_equal",
                sum(found.equal_answers) / max(1, len(found.equal_answers)),
                len(found.equal_answers), 1 if name == OWN else None)  # fmt: skip
    if not found.first_s:
        return
    _emit_times(f"{name}.second_engine_after_pause", [found.woken_s])
    emit(
        ratio_figure(
            f"ttft.{name}.second_engine",
            [found.first_s],
            [found.on_engine_s],
            "on that engine",
            target=Target("ratio", "<=", SECOND_OVER_ON_ENGINE) if name == OWN else None,
            is_quiet=found.is_quiet,
        )
    )


def _emit_times(figure: str, rounds: Rounds) -> None:
    values = [1e3 * value for one in rounds for value in one]
    emit(Figure(f"ttft.{figure}", statistics.median(values), "ms",
                spread=(min(values), max(values)), samples=len(values)))  # fmt: skip


def _emit_share(figure: str, share: float, samples: int, bound: float | None) -> None:
    target = None if bound is None else Target("value", ">=", bound)
    emit(Figure(f"ttft.{figure}", share, "share", target=target, samples=samples))


def _emit_ratio(
    figure: str,
    found: Measured,
    over: Rounds,
    under: Rounds,
    peer_name: str,
    bound: float | None = None,
    is_peer_quiet: bool = True,
) -> None:
    measured: IntervalFigure = ratio_figure(
        f"ttft.{figure}",
        over,
        under,
        peer_name,
        target=None if bound is None else Target("ratio", "<=", bound),
        is_quiet=found.is_quiet and is_peer_quiet,
    )
    emit(measured)


if __name__ == "__main__":
    sys.exit(main())
