"""What a router can be told, from one YAML file, the environment and flags.

Precedence: flag, environment (``KVKEEP_ROUTER_`` and the field's name), file, default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.model.plain import check_plain
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
FILE_BYTES_MAX = 1 << 20
"""Of a settings file; a mistaken path must not fill the memory."""
SECTIONS = ("engines", "etcd", "on_demand", "relay", "health", "limits", "events", "handoff")
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
    values = {} if file is None else _read_file(file)
    fields = {field.name for field in msgspec.structs.fields(RouterSettings)}
    for name, text in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            values[name.removeprefix(ENVIRONMENT_PREFIX).lower()] = text
    values.update(flags)
    if "transport" in values:
        section = values.get("handoff")
        told = section if isinstance(section, dict) else {}
        values["handoff"] = {**told, "transport": values.pop("transport")}
    unknown = sorted(str(name) for name in values if name not in fields)
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is not a setting of the router: "
            f"choose from {', '.join(sorted(fields))}"
        )
    if isinstance(values.get("engines"), list):
        values["engines"] = [
            {"url": engine} if isinstance(engine, str) else engine for engine in values["engines"]
        ]
    _add_handoff(values)
    try:
        settings = msgspec.convert(values, RouterSettings, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"the router's settings are wrong: {error}") from error
    check_distinct(settings.engines, "the router's settings")
    sources = (settings.engines, settings.engines_file, settings.etcd, settings.on_demand)
    if not any(sources):
        raise InputError("no engine is named: give URLs such as http://127.0.0.1:8000")
    return settings


def _add_handoff(values: dict[str, Any]) -> None:
    """Hand off where engines of the roles for it are named."""
    engines = values.get("engines")
    listed = engines if isinstance(engines, list) else []
    roles = {each.get("role") for each in listed if isinstance(each, dict)}
    wanted = {Role.PREFILL.value, Role.DECODE.value}
    if values.get("handoff") is None and not roles & wanted:
        return
    values["handoff"] = values.get("handoff") or {}
    comes_later = values.get("engines_file") or values.get("etcd")
    if roles - wanted or not (comes_later or roles >= wanted):
        raise InputError(
            "a hand-off needs engines for prefill and for decode, and no others: name them with "
            "--prefill URL and --decode URL, or role: prefill and role: decode"
        )


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            text = opened.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise InputError(f"{file} is larger than {FILE_BYTES_MAX} bytes: settings fit in less")
        values = msgspec.yaml.decode(text)
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{file} is not YAML: {said}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a mapping of settings: write lines such as 'port: 8080'")
    check_plain(values, str(file))
    return values
