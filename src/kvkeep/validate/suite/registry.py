"""All suites, by name, alias and group."""

import importlib
from collections.abc import Sequence
from functools import cache

from kvkeep.model.errors import InputError
from kvkeep.validate.suite.base import GROUPS, Context, NotApplicable, Report, Suite

MODULES = (
    "generation",
    "routing",
    "locality",
    "determinism",
    "concurrent",
    "disaggregated",
    "pd_accuracy",
    "tp_sweep",
    "cache_performance",
    "long_doc_qa",
    "lm_eval",
    "bench",
    "stress",
)
"""In the order in which ``all`` runs them: right answers first, then speed, then stress."""


@cache
def suites() -> tuple[Suite, ...]:
    """Every suite, in the order of `MODULES`."""
    found: list[Suite] = []
    for name in MODULES:
        module = importlib.import_module(f"kvkeep.validate.suites.{name}")
        found.extend(getattr(module, "SUITES", None) or [module.SUITE])
    return tuple(found)


def find(name: str) -> list[Suite]:
    """Suites of one name, alias or group.

    Raises:
        InputError: There is nothing of this name.
    """
    if name == "all":
        return list(suites())
    if name in GROUPS:
        return [suite for suite in suites() if name in suite.groups]
    wanted = name.removesuffix(".py").removesuffix(".sh")
    for suite in suites():
        if wanted == suite.name or wanted in suite.aliases:
            return [suite]
    known = ", ".join([*GROUPS, *(suite.name for suite in suites())])
    raise InputError(f"There is no suite {name!r}: take one of {known}.")


def find_all(names: Sequence[str]) -> list[Suite]:
    """Suites of several names, each once, in the order of `MODULES`.

    Raises:
        InputError: There is nothing of one of these names.
    """
    chosen = {suite.name for name in names for suite in find(name)}
    return [suite for suite in suites() if suite.name in chosen]


async def run_suite(suite: Suite, context: Context) -> Sequence[Report]:
    """Run one suite, or say why it does not apply.

    Raises:
        UnavailableError: Something that the suite judges by broke off.
        InputError: A setting does not fit the subject.
    """
    missing = suite.missing_in(context)
    if missing is not None:
        return [NotApplicable(suite.name, missing)]
    return await suite.run(context)


def table() -> str:
    """The table of docs/check.md."""
    lines = ["| suite | groups | needs | proves |", "|---|---|---|---|"]
    for suite in suites():
        needs = ", ".join(need.name for need in suite.needs) or "-"
        names = "".join(f"<br>`{alias}`" for alias in suite.aliases)
        groups = ", ".join((*suite.groups, "all"))
        lines.append(f"| **{suite.name}**{names} | {groups} | {needs} | {suite.proves} |")
    return "\n".join(lines)
