"""What a router can be told, from one YAML file, the environment and flags.

Precedence: flag, environment (``KVKEEP_ROUTER_`` and the field's name), file, default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.model.settings import sources
from kvkeep.router.cartridges.settings import CartridgeSettings
from kvkeep.router.events.block_events import BLOCK_TOKENS_MAX
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.handoff.settings import HandOffSettings
from kvkeep.router.health.book import HealthSettings
from kvkeep.router.limits.gate import LimitSettings
from kvkeep.router.membership.etcd import EtcdSettings
from kvkeep.router.membership.member import Member, check_distinct
from kvkeep.router.on_demand.starter import OnDemandSettings
from kvkeep.router.prefix_index import BLOCKS_MAX
from kvkeep.router.relay.settings import RelaySettings
from kvkeep.router.snapshot import Role

ENVIRONMENT_PREFIX = "KVKEEP_ROUTER_"
_ROUTER = sources.Program(name="router", prefix=ENVIRONMENT_PREFIX, example="port: 8080")
SECTIONS = (
    *("engines", "etcd", "on_demand", "relay", "health", "limits", "events", "handoff"),
    "cartridges",
)
"""Fields that the environment can't hold: they are more than one value."""

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
PolicyName = Literal[
    "round_robin",
    "least_loaded",
    "power_of_two",
    "consistent_hash",
    "session_affinity",
    "prefix_aware",
]


class RouterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one router; each is checked when it is made."""

    engines: list[Member] = []
    """The engines that are there from the start; further ones come by file or over the API."""
    engines_file: str = ""
    """YAML file with a list ``engines``, looked at again and again; empty: none."""
    policy: PolicyName = "round_robin"
    """How an engine is chosen for each request; docs/routing.md compares them."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other hosts in: set ``limits.keys_file`` then."""
    port: Port = 8080
    """Port of the OpenAI-compatible address; 0 takes a free one."""
    admin_host: str = "127.0.0.1"
    """Address of the admin port; any other than loopback needs ``admin_key_file``."""
    admin_port: Port = 0
    """Port for metrics, workers and explanations; 0 takes a free one."""
    admin_key_file: str = ""
    """File (mode 0600) that holds the key for the admin port; empty: none is asked for."""
    etcd: EtcdSettings | None = None
    """Where engines announce themselves in etcd; none: nowhere."""
    on_demand: OnDemandSettings | None = None
    """Engines that start at their first request; ``kvkeep up`` writes this."""
    tokenizer: str = ""
    """Folder of the model that the engines serve: ``prefix_aware`` then cuts prompts into the
    engines' own blocks of tokens and can hear their events. Empty: it compares texts."""
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=BLOCK_TOKENS_MAX)] = 16
    """Tokens per block of the engines (vLLM's ``--block-size``); counts with ``tokenizer`` only."""
    prefix_blocks_max: Annotated[int, msgspec.Meta(ge=1024, le=1 << 26)] = BLOCKS_MAX
    """Blocks that ``prefix_aware`` knows of at most, 256 bytes each for every engine that holds it;
    those used longest ago are forgotten."""
    events: EngineEvents = EngineEvents()
    """Where engines publish their block events that do not say so themselves."""
    engine_drain_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 60.0
    """How long requests may still run on an engine that leaves the fleet, in seconds."""
    handoff: HandOffSettings | None = None
    """How engines of the roles prefill and decode work together; none: every engine serves."""
    cartridges: CartridgeSettings | None = None
    """Which cartridges requests may name, and how; none: they pass as they are."""
    relay: RelaySettings = RelaySettings()
    health: HealthSettings = HealthSettings()
    limits: LimitSettings = LimitSettings()

    def __post_init__(self) -> None:
        names = (self.host, self.engines_file, self.admin_host, self.admin_key_file, self.tokenizer)
        publishers = [self.events, *(each.events for each in self.engines if each.events)]
        if not self.tokenizer and any(each.publish for each in publishers):
            raise ValueError("events are about tokens: name the engines' model with tokenizer")
        if not self.host or not self.admin_host or "\0" in "".join(names):
            raise ValueError("hosts and files must be names without a zero byte")
        if self.cartridges is not None and self.handoff is not None:
            raise ValueError("cartridges and a hand-off don't go together: leave one of them out")


def load_settings(
    file: Path | None, environment: Mapping[str, str], flags: Mapping[str, object]
) -> RouterSettings:
    """Combine what a user said; flags win, then the environment, then the file.

    Args:
        file: YAML mapping of field names, or None.
        environment: ``os.environ``; ``KVKEEP_ROUTER_PORT`` sets ``port``, and so on.
        flags: Only those that were given.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    settings = sources.load_settings(RouterSettings, _ROUTER, file, environment, flags, _prepare)
    check_distinct(settings.engines, "the router's settings")
    named = (settings.engines, settings.engines_file, settings.etcd, settings.on_demand)
    if not any(named):
        raise InputError("no engine is named: give URLs such as http://127.0.0.1:8000")
    return settings


def _prepare(values: dict[str, Any]) -> None:
    """Understand what people write more shortly."""
    if "transport" in values:
        section = values.get("handoff")
        told = section if isinstance(section, dict) else {}
        values["handoff"] = {**told, "transport": values.pop("transport")}
    if isinstance(values.get("engines"), list):
        values["engines"] = [
            {"url": engine} if isinstance(engine, str) else engine for engine in values["engines"]
        ]
    _add_handoff(values)


def _add_handoff(values: dict[str, Any]) -> None:
    """Hand off where engines of the roles for it are named."""
    engines = values.get("engines")
    listed = engines if isinstance(engines, list) else []
    named = [each.get("role") for each in listed if isinstance(each, dict)]
    roles = {role if isinstance(role, str) else None for role in named}
    wanted = {Role.PREFILL.value, Role.DECODE.value}
    if values.get("handoff") is None and not roles & wanted:
        return
    values["handoff"] = values.get("handoff") or {}
    if values.get("on_demand"):
        raise InputError("engines on demand can't hand off: name engines that run, or no roles")
    comes_later = values.get("engines_file") or values.get("etcd")
    if roles - wanted or not (comes_later or roles >= wanted):
        raise InputError(
            "a hand-off needs engines for prefill and for decode, and no others: name them with "
            "--prefill URL and --decode URL, or role: prefill and role: decode"
        )
