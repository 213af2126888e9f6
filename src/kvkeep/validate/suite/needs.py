"""What suites may need of a subject, each with the sentence that says how to supply it."""

from collections.abc import Callable
from dataclasses import dataclass

from kvkeep.validate.suite.base import Context
from kvkeep.validate.suite.programs import is_installed


@dataclass(frozen=True, slots=True)
class Needed:
    """One need: a name, a question, and what to say where the answer is no."""

    name: str
    is_met: Callable[[Context], bool]
    otherwise: str

    def missing_in(self, context: Context) -> str | None:
        """The sentence, or None."""
        return None if self.is_met(context) else self.otherwise


ROUTER_ADMIN = Needed(
    "a router's admin address",
    lambda context: context.subject.admin is not None,
    "It asks a router how it would choose: name its admin address with --router-admin, or give a "
    "stack file with a router.",
)
SEQUENCES = Needed(
    "listeners for sequences",
    lambda context: bool(context.subject.sequence_urls),
    "It puts K/V through the sequence interface: name listeners with --sequences-url, or set "
    "`sequences` in the daemon's settings.",
)
LONG_ENOUGH = Needed(
    "prompts of at least 512 tokens",
    lambda context: (context.subject.capabilities.max_model_len or 512) >= 512,
    "It asks long prompts, and the engine takes fewer than 512 tokens: raise max_model_len.",
)
PAIR = Needed(
    "a router before prefill and decode engines",
    lambda context: context.subject.front is not None and bool(context.subject.decode),
    "It asks a router before a pair: give a stack file whose engines have roles, or --router-url "
    "with --prefill-url and --decode-url.",
)
OWN_FLEETS = Needed(
    "a stack file, or none",
    lambda context: context.fleet is not None,
    "It starts pairs of several sizes itself: give a stack file with --stack, or no address.",
)
BASELINE = Needed(
    "an engine without a cache",
    lambda context: context.subject.baseline is not None,
    "It compares with an engine without a cache: name one with --baseline-url, or give a stack "
    "file with an engine of `connector: none`.",
)


def package(name: str, extra: str) -> Needed:
    """A Python package that the suite runs."""
    return Needed(
        f"the package {name}",
        lambda context: is_installed(context.settings, name),
        f"It runs {name}, which is not installed: install kvkeep[{extra}], or name an environment "
        "that has it with --venv-dir (VENV_DIR).",
    )
