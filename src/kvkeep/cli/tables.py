"""Tables for the documents, made from what the router itself goes by."""

import msgspec

from kvkeep.daemon.tables import field_texts
from kvkeep.router.cartridges.settings import CartridgeSettings
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.health.book import HealthSettings
from kvkeep.router.limits.gate import LimitSettings
from kvkeep.router.limits.keys import ApiKey
from kvkeep.router.membership.etcd import EtcdSettings
from kvkeep.router.membership.member import Member
from kvkeep.router.relay.settings import RelaySettings
from kvkeep.router.settings import ENVIRONMENT_PREFIX, SECTIONS, RouterSettings

SETTINGS: dict[str, type[msgspec.Struct]] = {
    "": RouterSettings,
    "limits.": LimitSettings,
    "health.": HealthSettings,
    "relay.": RelaySettings,
    "etcd.": EtcdSettings,
    "events.": EngineEvents,
    "handoff.": HandOffSettings,
    "cartridges.": CartridgeSettings,
}
"""Section to its settings."""


def router_settings_table() -> str:
    """Every setting of a router."""
    lines = ["| setting | environment | default | meaning |", "|---|---|---|---|"]
    for section, struct in SETTINGS.items():
        for field in msgspec.structs.fields(struct):
            if not section and field.name in SECTIONS and field.name != "engines":
                continue
            is_single = not section and field.name not in SECTIONS
            variable = f"`{ENVIRONMENT_PREFIX}{field.name.upper()}`" if is_single else "-"
            text = field_texts(struct)[field.name]
            lines.append(f"| `{section}{field.name}` | {variable} | {_default(field)} | {text} |")
    return "\n".join(lines)


def engine_table() -> str:
    """What an engine is announced with: in a file, over the API, in etcd."""
    return _fields(Member)


def api_key_table() -> str:
    """What a key's entry may say."""
    return _fields(ApiKey)


def _fields(struct: type[msgspec.Struct]) -> str:
    lines = ["| field | default | meaning |", "|---|---|---|"]
    texts = field_texts(struct)
    for field in msgspec.structs.fields(struct):
        lines.append(f"| `{field.name}` | {_default(field)} | {texts[field.name]} |")
    return "\n".join(lines)


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default
    if field.default_factory is not msgspec.NODEFAULT or value is None or value == ():
        return "none"
    if value is msgspec.NODEFAULT:
        return "required"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ", ".join(str(each) for each in value)
    return "empty" if value == "" else str(getattr(value, "value", value))
