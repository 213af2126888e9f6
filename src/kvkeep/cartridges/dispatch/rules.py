"""Rules by which a request gets a cartridge: by id, header, label, by default, or in that order.

A rule says an id, or that it has none and why. It does not look whether a cartridge of that id is
there: that is the dispatcher's, so that a request which names one never gets another in silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from kvkeep.cartridges.dispatch.asked import Asked, checked
from kvkeep.cartridges.dispatch.catalogue import Catalogue

ID_KEY: Final = "cartridge_id"
LABEL_KEY: Final = "cartridge_label"
HEADER: Final = "x-kvkeep-cartridge"


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a rule says of a request."""

    cartridge_id: str | None
    """None: this rule has no cartridge for it."""
    reason: str
    """Why; made of settings only, never of what the request says."""
    missing: str = ""
    """What the request named that no cartridge has, in words; empty: it named nothing."""
    is_asked: bool = True
    """Whether the request named it, and not the settings."""


class Rule(Protocol):
    """Says which cartridge a request gets; a pure function."""

    def resolve(self, asked: Asked, catalogue: Catalogue) -> Resolution:
        """Look at a request.

        Raises:
            InputError: What it names can't be a name.
        """
        ...


@dataclass(frozen=True, slots=True)
class Explicit:
    """The request says the id."""

    key: str = ID_KEY

    def resolve(self, asked: Asked, catalogue: Catalogue) -> Resolution:
        """Look under the key."""
        cartridge_id = asked.find(self.key)
        if cartridge_id is None:
            return Resolution(None, f"no {self.key}")
        return Resolution(cartridge_id, f"by {self.key}")


@dataclass(frozen=True, slots=True)
class ByHeader:
    """A header says the id: for whoever can't change bodies, such as a proxy."""

    header: str = HEADER

    def resolve(self, asked: Asked, catalogue: Catalogue) -> Resolution:
        """Look at the header."""
        value = asked.header(self.header)
        if value is None:
            return Resolution(None, f"no header {self.header}")
        return Resolution(checked(f"header {self.header}", value), f"by header {self.header}")


@dataclass(frozen=True, slots=True)
class ByLabel:
    """The request says the value of a label: a patient, a document, a topic."""

    label: str
    """Name of the cartridges' label."""
    key: str = LABEL_KEY
    """Where the request says the value."""

    def resolve(self, asked: Asked, catalogue: Catalogue) -> Resolution:
        """Look for cartridges with that label; the one that is there for longest is meant."""
        value = asked.find(self.key)
        if value is None:
            return Resolution(None, f"no {self.key}")
        found = catalogue.labelled(self.label, value)
        if not found:
            missing = f"the label {self.label}={shown(value)}"
            return Resolution(None, f"nothing has that {self.label}", missing)
        return Resolution(found[0].cartridge_id, f"by label {self.label}")


@dataclass(frozen=True, slots=True)
class Static:
    """Every request gets the same one."""

    cartridge_id: str

    def resolve(self, asked: Asked, catalogue: Catalogue) -> Resolution:
        """Say it."""
        return Resolution(self.cartridge_id, "by default", is_asked=False)


@dataclass(frozen=True, slots=True)
class Composite:
    """The first of several rules that has one."""

    rules: Sequence[Rule]

    def resolve(self, asked: Asked, catalogue: Catalogue) -> Resolution:
        """Ask one after another."""
        reasons, missing = [], ""
        for rule in self.rules:
            found = rule.resolve(asked, catalogue)
            if found.cartridge_id is not None:
                return found
            reasons.append(found.reason)
            missing = missing or found.missing
        return Resolution(None, ", ".join(reasons), missing)


def headers_of(rule: Rule) -> list[str]:
    """Headers that a rule looks at."""
    if isinstance(rule, ByHeader):
        return [rule.header]
    if isinstance(rule, Composite):
        return [header for each in rule.rules for header in headers_of(each)]
    return []


def shown(value: str) -> str:
    """What a request says, fit for one line of an answer or a log."""
    safe = "".join(letter if " " <= letter <= "~" else "?" for letter in value)
    return safe if len(safe) <= 80 else f"{safe[:80]}..."
