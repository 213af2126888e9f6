"""A suite: a name, what it needs, what it proves, and a function that runs it.

What it is
    One module in `kvkeep.validate.suites`, whose ``SUITE`` declares it. The table in
    `kvkeep.validate.suite.registry` lists the modules.

Life of one run
    The caller opens a subject, asks ``missing_in`` what the suite lacks there, and awaits ``run``
    once. Lists among the settings (answer lengths, requests in flight) make several reports.

The caller guarantees
    The subject was probed, and everything in ``needs`` is there. Nothing else is sent to it
    meanwhile.

The implementer must
    Return reports for whatever the subject does wrong, and raise only for what keeps it from
    judging at all: `UnavailableError` where counters can't be read, `InputError` for bad settings.
    Prove that the path under test ran, by a gate among the checks. Leave nothing behind outside
    the results folder.

Threading and blocking
    One event loop; work that blocks goes to a thread or a child process.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from kvkeep.stack.spec import StackSpec
from kvkeep.validate.arms.bisection import Suspect
from kvkeep.validate.load import ResetReport, Sampling
from kvkeep.validate.runner import (
    Check,
    Judged,
    Phase,
    Progress,
    Served,
    count_verdicts,
    no_progress,
)
from kvkeep.validate.settings import CheckSettings, Document
from kvkeep.validate.subject import Subject
from kvkeep.validate.verdict import PASSING, Verdict


class Outcome(StrEnum):
    """What became of a suite."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_EXERCISED = "not-exercised"
    """Nothing was wrong, but the path under test did not run: not a pass."""
    NOT_APPLICABLE = "not-applicable"
    """The subject lacks what the suite needs; ``reason`` says what."""
    REFUSED = "refused"
    """A fleet that its own stack refused by name before it started anything: no failure."""


UNCOUNTED = frozenset({Outcome.NOT_APPLICABLE, Outcome.REFUSED})
"""Neither a pass nor a failure, beside others that are."""


class Report(Protocol):
    """What every run returns, whatever it did."""

    @property
    def outcome(self) -> str:
        """One of `Outcome`."""

    @property
    def passed(self) -> bool:
        """True only if every promise was shown to hold."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check.md."""


@dataclass(slots=True)
class SuiteReport:
    """Everything a run found."""

    suite: str
    mode: str
    """Which of the suite's variants, such as ``cache-reset``."""
    run_id: str
    exact: bool
    sampling: Sampling
    settings: CheckSettings
    subject: Subject
    noise_nats: float = 0.0
    reset: ResetReport | None = None
    served: Served | None = None
    phases: list[Phase] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    cold_agreement: dict[str, int] = field(default_factory=dict)
    """Verdicts of the replay against computed answers; for information unless exact."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What was measured, by name with its unit."""
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sizes that had to give way, such as to the model's length: ``asked`` and ``run``."""
    data: str = "the shipped plays"
    """Where prompts came from."""
    files: dict[str, str] = field(default_factory=dict)
    """Result files that were written, by name."""
    suspects: list[Suspect] = field(default_factory=list)
    """Wrong answers that were looked into."""
    judges_answers: bool = True
    """False for suites that prove something without answers of a model."""

    @property
    def outcome(self) -> str:
        """``passed``, ``failed`` or ``not-exercised``; a failure outweighs the rest."""
        verdicts = {item.judgement.verdict for item in self.judged}
        wrong = verdicts - PASSING - {Verdict.NOT_EXERCISED}
        if wrong or any(check.ok is False and not check.gate for check in self.checks):
            return Outcome.FAILED.value
        idle = any(check.ok is not True for check in self.checks if check.gate)
        proof = self.judged if self.judges_answers else [c for c in self.checks if c.ok]
        if idle or Verdict.NOT_EXERCISED in verdicts or not proof:
            return Outcome.NOT_EXERCISED.value
        return Outcome.PASSED.value

    @property
    def passed(self) -> bool:
        """True only if every promise was shown to hold."""
        return self.outcome == Outcome.PASSED.value

    def check(self, name: str, ok: bool | None, detail: str, *, gate: bool = False) -> None:
        """Note a promise that is not about a single answer; see `Check`."""
        self.checks.append(Check(name, ok, detail, gate))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check.md."""
        return {
            "schema": f"kvkeep.check.{self.suite}/1",
            "suite": self.suite,
            "mode": self.mode,
            "outcome": self.outcome,
            "passed": self.passed,
            "run_id": self.run_id,
            "exact": self.exact,
            "scale": self.settings.scale,
            "data": self.data,
            "sampling": {"max_tokens": self.sampling.max_tokens, "seed": self.sampling.seed},
            "settings": self.settings.to_dict(),
            "sizes": self.sizes,
            "subject": self.subject.to_dict(),
            "noise_nats": self.noise_nats,
            "reset": self.reset.to_dict() if self.reset else None,
            "served": self.served.to_dict() if self.served else None,
            "phases": [phase.to_dict() for phase in self.phases],
            "checks": [check.to_dict() for check in self.checks],
            "numbers": self.numbers,
            "files": self.files,
            "counts": count_verdicts(self.judged),
            "cold_agreement": self.cold_agreement,
            "requests": [item.to_dict() for item in self.judged],
            "suspects": [suspect.to_dict() for suspect in self.suspects],
        }


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """A suite that could not run on this subject."""

    suite: str
    reason: str
    """One sentence: what is missing, and what would supply it."""
    outcome: str = Outcome.NOT_APPLICABLE.value
    passed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "schema": f"kvkeep.check.{self.suite}/1",
            "suite": self.suite,
            "outcome": self.outcome,
            "passed": self.passed,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Fleet:
    """One of several stacks that a suite starts itself, one after the other."""

    prefill: str
    """Its prefill engines, in a few words such as ``TP 2``."""
    decode: str
    spec: StackSpec

    @property
    def mode(self) -> str:
        """What tells it from the suite's others."""
        return f"{self.prefill} to {self.decode}"

    def to_dict(self) -> dict[str, str]:
        """JSON form: its place in the matrix of all fleets."""
        return {"prefill": self.prefill, "decode": self.decode}


@dataclass(frozen=True, slots=True)
class NotStarted:
    """A fleet that a suite was to run on, and that there is not."""

    suite: str
    prefill: str
    decode: str
    outcome: str
    """``refused``; ``not-applicable`` where the machine is too small; or ``failed``."""
    reason: str
    """One sentence."""
    passed: bool = False

    @property
    def mode(self) -> str:
        """As a fleet's."""
        return f"{self.prefill} to {self.decode}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "schema": f"kvkeep.check.{self.suite}/1",
            "suite": self.suite,
            "mode": self.mode,
            "outcome": str(self.outcome),
            "passed": self.passed,
            "reason": self.reason,
            "fleet": {"prefill": self.prefill, "decode": self.decode},
        }


Template = Callable[[Mapping[str, Mapping[str, int]]], StackSpec]
"""Gives a stack whose engines of each role have certain fields; raises `InputError` for one that
can't be."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a suite is given."""

    subject: Subject
    settings: CheckSettings
    words: Sequence[str]
    """The long text."""
    new_run_id: Callable[[], str]
    """Gives an id that no earlier run had: it salts requests, so that no old KV is found."""
    exact: bool = False
    results: Path | None = None
    """Folder for result files; None writes none."""
    progress: Progress = no_progress
    named: frozenset[str] = frozenset()
    """Settings that a person named: they are kept as they are."""
    fleet: Fleet | None = None
    """Which of its own fleets the subject is, for a suite that starts several."""

    def new_report(self, suite: str, mode: str, max_tokens: int) -> SuiteReport:
        """Start a report with a run id of its own."""
        sampling = Sampling(max_tokens, self.settings.seed)
        return SuiteReport(
            suite, mode, self.new_run_id(), self.exact, sampling, self.settings, self.subject
        )


class Plan(Protocol):
    """Says what a suite starts."""

    def __call__(
        self, template: Template, settings: CheckSettings
    ) -> "Sequence[Fleet | NotStarted | NotApplicable]":
        """Fleets, and what is left out and why.

        Raises:
            InputError: The template or a setting is wrong.
        """


class Need(Protocol):
    """Something a suite can't do without."""

    @property
    def name(self) -> str:
        """In a few words, for ``kvkeep check list``."""

    def missing_in(self, context: Context) -> str | None:
        """Say what is missing and what would supply it, or None if it is there."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One suite, as its module declares it."""

    name: str
    title: str
    """What it does, in one sentence."""
    proves: str
    """What is known when it passed, in one sentence."""
    document: Document
    run: Callable[[Context], Awaitable[Sequence[Report]]]
    groups: tuple[str, ...] = ()
    """Of `GROUPS`; every suite is in ``all``."""
    aliases: tuple[str, ...] = ()
    """Names that the reference document gives it."""
    needs: tuple[Need, ...] = ()
    settings: tuple[str, ...] = ()
    """Settings that it takes beside those of its document."""
    needs_baseline: bool = False
    """A stack that is started for it gets an engine without a cache, too."""
    needs_router: bool = False
    """A stack that is started for it keeps its router."""
    needs_pair: bool = False
    """A stack that is started for it has prefill and decode engines, and nothing else."""
    needs_sequences: bool = False
    """A daemon that is started for it keeps named sequences' K/V, too."""
    fleets: Plan | None = None
    """Given by a suite that does not run on the stack that others share: its own, in order."""
    small_s: float = 60.0
    """About how long it takes at the small scale on two cores, in seconds: for estimates."""

    def missing_in(self, context: Context) -> str | None:
        """Say what the subject lacks for this suite, or None."""
        found = (need.missing_in(context) for need in self.needs)
        return next((reason for reason in found if reason is not None), None)


GROUPS: Mapping[str, str] = {
    "quick": "answers and routes, in a few minutes",
    "performance": "what the cache gains",
    "stress": "many requests at once, and little memory",
    "all": "everything",
}
"""What each group is about."""
