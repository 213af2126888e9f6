"""Which cartridges a router knows, and how requests name them."""

from typing import Annotated, Any

import msgspec

from kvkeep.cartridges.dispatch.config import build_rule
from kvkeep.cartridges.dispatch.dispatcher import Unknown
from kvkeep.model.errors import InputError


def explicit() -> dict[str, Any]:
    """The rule of a router that is told of none."""
    return {"type": "explicit"}


class CartridgeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How requests get cartridges."""

    library: str = ""
    """Folder of the registry whose cartridges requests may name; empty: this user's own."""
    router: dict[str, Any] = msgspec.field(default_factory=explicit)
    """Which cartridge a request gets: ``{type: explicit}``, which is meant if nothing is said, or
    ``header``, ``label``, ``static`` or ``composite`` (docs/cartridges.md)."""
    unknown: Unknown = "refuse"
    """A request that names a cartridge which is not there is refused with 404, or has an engine
    ``compute`` it without."""
    resident_at: Annotated[str, msgspec.Meta(max_length=512, pattern=r"^(http://[^\s]+)?$")] = ""
    """Page on which the daemon of an engine's host says which cartridges its pool has, such as
    ``http://{host}:9400/status``; ``{host}`` and ``{port}`` stand for the engine's own. Empty:
    nobody says, and cartridges don't decide where a request goes."""
    refresh_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 1.0
    """How often registry and pages are read again."""

    def __post_init__(self) -> None:
        try:
            build_rule(self.router)
        except InputError as error:
            raise ValueError(str(error)) from error
        if "\0" in self.library:
            raise ValueError("library must be a folder's name without a zero byte")
        rest = self.resident_at.replace("{host}", "").replace("{port}", "")
        if "{" in rest or "}" in rest:
            raise ValueError("resident_at: only {host} and {port} stand for something")
