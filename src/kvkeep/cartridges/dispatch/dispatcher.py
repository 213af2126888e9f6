"""From a request to a cartridge that is there, to none, or to a refusal."""

from dataclasses import dataclass
from typing import Literal

from kvkeep.cartridges.dispatch.asked import Asked
from kvkeep.cartridges.dispatch.catalogue import Catalogue, Known
from kvkeep.cartridges.dispatch.rules import Resolution, Rule, shown
from kvkeep.model.errors import InputError, UnavailableError

Unknown = Literal["refuse", "compute"]
"""What becomes of a request that names a cartridge which is not there."""


class UnknownCartridgeError(InputError):
    """A request names a cartridge that is not there: a 404."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Which cartridge a request gets."""

    cartridge: Known | None
    """None: it is computed as any other."""
    reason: str
    """One short ASCII phrase, without anything that the request says."""
    is_missing: bool = False
    """Whether it named one that is not there."""


class Dispatcher:
    """A rule, and what becomes of requests for which it finds nothing. Pure."""

    def __init__(self, rule: Rule, unknown: Unknown = "refuse") -> None:
        self._rule, self._unknown = rule, unknown

    def decide(self, asked: Asked, catalogue: Catalogue) -> Decision:
        """Decide about one request.

        Raises:
            UnknownCartridgeError: It names one that is not there, and such are refused.
            InputError: What it names can't be a name.
            UnavailableError: The one that the settings name is not there, and such are refused.
        """
        found = self._rule.resolve(asked, catalogue)
        if found.cartridge_id is None:
            if found.missing and self._unknown == "refuse":
                raise UnknownCartridgeError(
                    f"no cartridge has {found.missing}: see kvkeep cartridge ls, and register one"
                )
            return Decision(None, found.reason, is_missing=bool(found.missing))
        known = catalogue.find(found.cartridge_id)
        if known is not None:
            return Decision(known, found.reason)
        if self._unknown == "refuse":
            raise _refusal(found, found.cartridge_id)
        return Decision(None, f"unknown {found.reason}", is_missing=True)


def _refusal(found: Resolution, cartridge_id: str) -> InputError | UnavailableError:
    if found.is_asked:
        return UnknownCartridgeError(
            f"there is no cartridge {shown(cartridge_id)!r}: see kvkeep cartridge ls, and register "
            "it"
        )
    return UnavailableError(
        f"the cartridge of this address, {shown(cartridge_id)!r}, is not there: register it"
    )
