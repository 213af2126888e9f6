"""Rules out of settings, in the words in which CartridgeConnector's ``router`` has them.

    {"type": "composite", "routers": [
        {"type": "explicit"},
        {"type": "label", "label_key": "patient_id", "extras_key": "patient_id"},
        {"type": "static", "cartridge_id": "doc_a"}]}

asks for the id, then for a patient, and gives everybody else ``doc_a``.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from kvkeep.cartridges.dispatch.rules import (
    HEADER,
    ID_KEY,
    LABEL_KEY,
    ByHeader,
    ByLabel,
    Composite,
    Explicit,
    Rule,
    Static,
)
from kvkeep.model.errors import InputError

FIELDS: Final = {
    "explicit": {"key"},
    "header": {"header"},
    "label": {"label_key", "extras_key"},
    "static": {"cartridge_id"},
    "composite": {"routers"},
}
"""Type of a rule to what may be said of it."""
DEPTH_MAX: Final = 8
RULES_MAX: Final = 64


def build_rule(
    config: Mapping[str, Any] | None,
    *,
    default_id: str | None = None,
    has_labels: bool = True,
) -> Rule:
    """The rule that settings describe.

    Args:
        config: What they say; empty: everything gets the default.
        default_id: The one cartridge of settings that name just one.
        has_labels: Whether there is a registry that knows labels.

    Raises:
        InputError: One sentence that says what is wrong with them.
    """
    if not config:
        if default_id is None:
            raise InputError(
                "router config is empty and there is no default cartridge: name a type, one of "
                f"{', '.join(FIELDS)}"
            )
        return Static(default_id)
    return _Builder(default_id, has_labels).build(config, 1)


class _Builder:
    def __init__(self, default_id: str | None, has_labels: bool) -> None:
        self._default_id, self._has_labels = default_id, has_labels
        self._build: dict[str, Callable[[Mapping[str, Any], int], Rule]] = {
            "explicit": self._explicit,
            "header": self._header,
            "label": self._label,
            "static": self._static,
            "composite": self._composite,
        }

    def build(self, config: Any, depth: int) -> Rule:
        if not isinstance(config, Mapping):
            raise InputError("a router is described by a mapping such as {type: explicit}")
        kind = config.get("type", "explicit")
        if not isinstance(kind, str) or kind not in FIELDS:
            raise InputError(
                f"unknown router type: {str(kind)[:80]}: choose from {', '.join(FIELDS)}"
            )
        odd = sorted(str(name)[:80] for name in config.keys() - FIELDS[kind] - {"type"})
        if odd:
            raise InputError(
                f"{kind} router does not know {', '.join(odd)}: it has "
                f"{', '.join(sorted(FIELDS[kind]))}"
            )
        return self._build[kind](config, depth)

    def _explicit(self, config: Mapping[str, Any], depth: int) -> Rule:
        return Explicit(_text(config, "explicit", "key", ID_KEY))

    def _header(self, config: Mapping[str, Any], depth: int) -> Rule:
        header = _text(config, "header", "header", HEADER).lower()
        if not header.isascii() or not header.replace("-", "").isalnum():
            raise InputError(f"header router: {header[:80]!r} is no name of a header")
        return ByHeader(header)

    def _label(self, config: Mapping[str, Any], depth: int) -> Rule:
        if not self._has_labels:
            raise InputError("label router requires a CartridgeRegistry: name the folder of one")
        label = _text(config, "label", "label_key", None)
        return ByLabel(label, _text(config, "label", "extras_key", LABEL_KEY))

    def _static(self, config: Mapping[str, Any], depth: int) -> Rule:
        return Static(_text(config, "static", "cartridge_id", self._default_id))

    def _composite(self, config: Mapping[str, Any], depth: int) -> Rule:
        listed = config.get("routers")
        if not isinstance(listed, list | tuple) or not 1 <= len(listed) <= RULES_MAX:
            raise InputError(
                f"composite router requires 'routers', a list of 1 to {RULES_MAX} routers"
            )
        if depth >= DEPTH_MAX:
            raise InputError(f"composite routers are nested over {DEPTH_MAX} deep: flatten them")
        return Composite(tuple(self.build(each, depth + 1) for each in listed))


def _text(config: Mapping[str, Any], kind: str, name: str, default: str | None) -> str:
    value = config.get(name, default)
    if value is None:
        raise InputError(f"{kind} router requires {name!r}")
    if not isinstance(value, str) or not value:
        raise InputError(f"{kind} router: {name!r} must be a text that is not empty")
    return value
