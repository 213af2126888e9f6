"""What a report file says, as types: files are read, checked and documented from here.

A suite may write further fields into its run; readers pass over what they do not know. A field that
stands here is never given another meaning: that would be another number behind `FORM`.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.validate.verdict import PASSING, Verdict

FORM = "kvkeep.check/1"
"""Name and number of this form, the first field of every file."""
_PASSES = frozenset(verdict.value for verdict in PASSING)
REPORT_BYTES_MAX = 1 << 30
"""A report is read into memory; evidence of a million requests stays below this."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What one request got back."""

    text: str = ""
    """As it came, untrusted."""
    tokens: list[str] = []
    """Generated tokens, as `token_id:N` where the server says ids."""
    finish_reason: str | None = None
    """As the server says."""
    error: str | None = None
    """Why there is no usable answer; null if there is one."""
    prompt_tokens: int | None = None
    """Length of the prompt in tokens."""
    cached_tokens: int | None = None
    """Prompt tokens that the engine did not compute, as it says."""
    ttft_s: float | None = None
    """Seconds from sending to the first token."""
    total_s: float | None = None
    """Seconds from sending to the last byte."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One judged request with its evidence."""

    phase: str
    """In which part of the run it was asked."""
    prompt_id: str
    """Unique within the run; the same prompt has the same one in every phase."""
    verdict: str
    """See docs/check.md."""
    kind: str = ""
    """Kind of prompt."""
    index: int = 0
    """Position in the phase, 0-based."""
    reason: str = ""
    """The verdict in one sentence."""
    position: int | None = None
    """First different token, 0-based."""
    reference_top2: list[tuple[str, float]] = []
    """The reference's two best tokens there, with logprobs."""
    candidate_top2: list[tuple[str, float]] = []
    """The answer's two best tokens there."""
    gap_nats: float | None = None
    """Distance of the reference's two best tokens."""
    logprob_diff_nats: float | None = None
    """Largest difference of logprobs of equal tokens up to the first different one."""
    noise_nats: float = 0.0
    """The noise it was judged with."""
    would_be: str | None = None
    """The verdict that was withdrawn because the path under test did not run."""
    reference: Answer = Answer()
    """What it was compared with."""
    candidate: Answer = Answer()
    """What was judged."""

    @property
    def passes(self) -> bool:
        """Whether the verdict is a pass."""
        return self.verdict in _PASSES


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """How far counters moved in a phase."""

    engine: dict[str, float] = {}
    """By vLLM's names without `_total`."""
    daemon: dict[str, int] = {}
    """By kvkeep's daemon's names; empty where no daemon was named."""


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One pass over prompts."""

    name: str
    """As requests name it."""
    requests: int = 0
    """Answers, failed ones included."""
    errors: int = 0
    """Failed ones."""
    wall_s: float | None = None
    """Seconds from the first request to the last answer."""
    ttft_s_median: float | None = None
    """Median time to first token, in seconds."""
    counters: Counters = Counters()
    """How far they moved meanwhile."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One promise that is not about a single answer."""

    name: str
    """What is promised."""
    ok: bool | None
    """Null: could not be checked here."""
    detail: str = ""
    """What was found."""
    gate: bool = False
    """Failing means that the path under test did not run, not that it is wrong."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prompt tokens of a replay came from."""

    external_tokens: int = 0
    """From outside the engine."""
    local_tokens: int = 0
    """From the engine's own cache."""
    servable_external_tokens: int | None = None
    """What the outside could have served."""
    servable_local_tokens: int | None = None
    """What the engine itself could have served."""
    share: float | None = None
    """External over servable external tokens."""
    share_min: float | None = None
    """Below it the replay proves nothing."""


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One way to come by the KV, in a run of arms."""

    name: str
    """Such as `reset`."""
    phase: Phase
    """Its requests and counters."""
    source: str = ""
    """Where its KV had to come from: `nowhere`, `engine` or `outside`."""
    served: Served | None = None
    """Where its prompt tokens came from."""
    check: Check | None = None
    """Whether they came from where they had to."""
    counts: dict[str, int] = {}
    """Requests per verdict."""
    requests: list[Request] = []
    """Judged ones; the first arm is what others are judged against."""


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """How a suspicious prompt fared in one arm."""

    arm: str
    """Such as `disk`."""
    blocks: str = ""
    """Which blocks it was about: `none`, `of the run`, `stored anew`."""
    asked: int = 0
    """Times that it was asked."""
    differed: int = 0
    """Times that the answer was wrong."""
    unproven: int = 0
    """Times that it failed, or that its KV did not come from where the arm says."""


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt with a wrong answer, asked again in every arm."""

    prompt_id: str
    """As requests name it."""
    phase: str = ""
    """Where the wrong answer was found."""
    verdict: str = ""
    """On that answer."""
    first: str | None = None
    """The nearest arm that is wrong; null if none is."""
    sentence: str = ""
    """What was found, in one sentence."""
    tallies: list[Tally] = []
    """In the order of asking."""
    broken_off: str | None = None
    """Why arms are missing."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One suite, run once."""

    schema: str
    """Form of the suite's own fields, such as `kvkeep.check.determinism/1`."""
    suite: str
    """Name of the suite."""
    outcome: str
    """`passed`, `failed`, `not-exercised`; `not-applicable`: it could not run here; or `refused`: a
    fleet that its own stack refused."""
    passed: bool
    """True only if everything was shown to hold."""
    mode: str = ""
    """Which of the suite's ways."""
    reason: str = ""
    """What a suite that is not applicable lacks, or why a fleet was not started."""
    run_id: str = ""
    """Begins the salts of its requests."""
    took_s: float | None = None
    """Seconds from its beginning to its end."""
    scale: str = ""
    """Which sizes were run: `small` or `full`."""
    data: str = ""
    """Where its prompts came from."""
    exact: bool = False
    """Whether answers had to be equal to the bit."""
    sampling: dict[str, Any] = {}
    """`max_tokens` and `seed`."""
    settings: dict[str, Any] = {}
    """Everything that was settable, as it was set."""
    sizes: dict[str, Any] = {}
    """Sizes that had to give way: `asked` and `run`."""
    subject: dict[str, Any] = {}
    """What was checked: addresses, and `capabilities` as the probe found them."""
    noise_nats: float | None = None
    """A/A noise floor."""
    reset: dict[str, Any] | None = None
    """What the reset of the engine's cache did."""
    served: Served | None = None
    """Where the replay's prompt tokens came from."""
    phases: list[Phase] = []
    """In the order in which they ran."""
    checks: list[Check] = []
    """Promises that are not about single answers."""
    numbers: dict[str, Any] = {}
    """What the suite measured, by name with its unit."""
    files: dict[str, str] = {}
    """Result files that it wrote, by name."""
    counts: dict[str, int] = {}
    """Requests per verdict."""
    cold_agreement: dict[str, int] = {}
    """Verdicts against computed answers; for information unless exact."""
    requests: list[Request] = []
    """One for each judged answer."""
    suspects: list[Suspect] = []
    """Wrong answers that were looked into."""
    arms: list[Arm] = []
    """In a run of arms: everything by arm."""
    fleet: dict[str, str] = {}
    """Of a suite that starts several: which `prefill` and `decode` engines this one had."""

    @property
    def title(self) -> str:
        """What tells it from other runs of a report."""
        length = self.sampling.get("max_tokens")
        parts = [self.suite, self.mode, "exact" if self.exact else ""]
        return " · ".join([part for part in parts if part] + ([f"{length} tokens"] * bool(length)))

    @property
    def all_phases(self) -> list[Phase]:
        """Of the run and of its arms."""
        return [*self.phases, *(arm.phase for arm in self.arms)]

    @property
    def all_checks(self) -> list[Check]:
        """Of the run and of its arms."""
        return [*self.checks, *(arm.check for arm in self.arms if arm.check is not None)]

    @property
    def all_requests(self) -> list[Request]:
        """Of the run and of its arms."""
        return [*self.requests, *(request for arm in self.arms for request in arm.requests)]

    @property
    def all_served(self) -> dict[str, Served]:
        """Of the run's replay (the empty name), and of each arm that had to load."""
        found = {"": self.served} if self.served is not None else {}
        loading = [arm for arm in self.arms if arm.source == "outside" and arm.served is not None]
        return found | {arm.name: arm.served for arm in loading if arm.served is not None}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole file."""

    schema: str
    """`kvkeep.check/1`: name and number of this form."""
    passed: bool
    """True only if every run passed."""
    runs: list[Run]
    """In the order in which they ran."""
    logs: dict[str, list[str]] = {}
    """The last lines of each process of a stack that was started, by its name."""
    matrix: dict[str, dict[str, str]] = {}
    """Outcomes of a suite that started several fleets, by prefill and by decode engines."""


_DOCUMENTED = (Report, Run, Phase, Counters, Check, Served, Arm, Request, Answer)


def convert_report(values: Any, name: str = "the report") -> Report:
    """Check what was decoded.

    Args:
        values: Made of dictionaries, lists and values.
        name: What messages call it.

    Raises:
        InputError: It is no report, or of a form that this version does not read.
    """
    found = values.get("schema") if isinstance(values, dict) else None
    if found != FORM:
        said = "names no form" if found is None else f"has the form {str(found)[:40]!r}"
        raise InputError(
            f"{name} {said}, and this version reads {FORM}: give a file that "
            "kvkeep check wrote with --json."
        )
    try:
        report = msgspec.convert(values, Report)
    except msgspec.ValidationError as error:
        raise InputError(f"{name} is no whole report: {error}.") from error
    if unknown := sorted(_verdicts(report) - {verdict.value for verdict in Verdict}):
        raise InputError(f"{name} has verdicts that this version does not know: {unknown[:3]}.")
    return report


def read_report(path: Path) -> Report:
    """Read a report file.

    Raises:
        InputError: It can't be read, or is no report of this form.
    """
    try:
        if path.stat().st_size > REPORT_BYTES_MAX:
            raise InputError(f"{path} has more than {REPORT_BYTES_MAX >> 20} MiB: is it a report?")
        values = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}): give a report that kvkeep check wrote."
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no JSON file: {error}.") from error
    return convert_report(values, str(path))


def _verdicts(report: Report) -> set[str]:
    return {request.verdict for run in report.runs for request in run.all_requests}


def json_schema() -> dict[str, Any]:
    """The form as a JSON Schema (2020-12)."""
    made = msgspec.json.schema(Report)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": FORM, **made}


def field_tables() -> str:
    """Every field of every part, for docs/check-report.md."""
    return "\n".join(line for struct in _DOCUMENTED for line in _table(struct)).rstrip()


def _table(struct: type[msgspec.Struct]) -> Iterator[str]:
    texts = _field_texts(struct)
    yield f"### {struct.__name__}"
    yield ""
    yield (inspect.getdoc(struct) or "").splitlines()[0]
    yield ""
    yield "| field | type | always | meaning |"
    yield "|---|---|---|---|"
    for field in msgspec.structs.fields(struct):
        yield (
            f"| `{field.name}` | {_type_name(field.type)} | {'yes' if field.required else ''} "
            f"| {texts[field.name]} |"
        )
    yield ""


def _type_name(kind: Any) -> str:
    plain = kind.__name__ if isinstance(kind, type) else str(kind)
    return plain.replace(f"{__name__}.", "").replace("typing.", "").replace(" | None", " or null")


def _field_texts(struct: type) -> dict[str, str]:
    """What stands below each field of a class, on one line."""
    (tree,) = ast.parse(inspect.getsource(struct)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return texts
