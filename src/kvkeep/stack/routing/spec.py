"""What a stack file says of its router, and what the router is told in its own settings."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.router.events.settings import EngineEvents
from kvkeep.router.settings import SECTIONS, PolicyName, Port, RouterSettings, load_settings

if TYPE_CHECKING:
    from kvkeep.stack.spec import EngineSpec, StackSpec

SETTINGS = "router.settings"
_FILES = (
    ("admin_key_file",),
    ("engines_file",),
    ("limits", "keys_file"),
    ("etcd", "ca_file"),
    ("etcd", "cert_file"),
    ("etcd", "key_file"),
    ("etcd", "password_file"),
    ("cartridges", "library"),
)
"""Settings that name a file or folder of the user's."""

_ELSEWHERE = {"engines": "engines", "on_demand": "engines", "handoff": "router.handoff"}
"""Settings of the router that a stack says in another place, and that place."""

Values = dict[str, Any]


class RouterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The router of a stack: one address for all its engines."""

    policy: PolicyName = "round_robin"
    """How an engine is chosen for each request; docs/routing.md compares them."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other hosts in: set ``limits.keys_file`` then."""
    port: Port = 0
    """TCP port of the OpenAI-compatible address; 0 takes a free one."""
    admin_port: Port = 0
    """TCP port on 127.0.0.1 for metrics, workers and explanations; 0 takes a free one."""
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 10.0
    """How long requests may still run when the stack goes down, in seconds."""
    limits: dict[str, Any] = {}
    """How much is taken on, and whose requests; docs/router-operations.md has the fields."""
    handoff: dict[str, Any] = {}
    """How prefill is handed off, where engines have a ``role``; docs/hand-off.md has the fields.
    ``transport`` follows from the engines' ``connector``."""
    events: bool = False
    """With ``policy: prefix_aware``: prompts are cut into the engines' own blocks of tokens, and
    engines and the daemon tell the router what they hold, instead of a comparison of texts."""
    settings: dict[str, Any] = {}
    """Any further setting of the router, passed on."""


def router_values(
    spec: "StackSpec",
    urls: Mapping[str, str],
    more: Values,
    events: Mapping[str, EngineEvents] | None = None,
) -> Values:
    """What the router is told, as its settings file says it.

    Args:
        spec: Of the stack; it has a router.
        urls: Addresses of all engines, by name.
        more: Further settings that the stack decides.
        events: Where engines publish what they hold, by name.

    Raises:
        InputError: ``router.settings`` holds something the router does not take.
    """
    router = spec.router
    assert router is not None
    own: Values = {
        "policy": router.policy,
        "host": router.host,
        "port": router.port,
        "admin_port": router.admin_port,
        "limits": router.limits,
        "engines": [
            member_values(engine, urls[engine.name], events)
            for engine in spec.engines
            if not engine.on_demand
        ],
        **more,
    }
    on_demand = on_demand_values(spec, urls)
    if on_demand is not None:
        own["on_demand"] = on_demand
    transport = transport_of(spec)
    if transport is not None:
        own["handoff"] = {**router.handoff, "transport": transport}
    for field in (own.keys() | _ELSEWHERE.keys()) & router.settings.keys():
        place = _ELSEWHERE.get(field, f"router.{field}")
        raise InputError(f"{SETTINGS}.{field}: write it as {place} instead.")
    relay = router.settings.get("relay", {})
    if not isinstance(relay, dict):
        raise InputError(f"{SETTINGS}.relay: it is a mapping of settings.")
    if "drain_s" in relay:
        raise InputError(f"{SETTINGS}.relay.drain_s: write it as router.drain_s instead.")
    values = {**router.settings, **own, "relay": {**relay, "drain_s": router.drain_s}}
    _settings(values)
    return values


def _settings(values: Values) -> RouterSettings:
    try:
        return load_settings(None, {}, values)
    except InputError as error:
        raise InputError(f"router: {error}") from error


def check_router(spec: "StackSpec") -> None:
    """Refuse a router, or engines that need one, that can't be.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    for idx, engine in enumerate(spec.engines):
        _check_engine(spec, engine, f"engines[{idx}]")
    if spec.router is None:
        return
    _check_roles(spec)
    _check_events(spec, spec.router)
    urls = {
        engine.name: engine.url or f"http://127.0.0.1:{idx + 1}"
        for idx, engine in enumerate(spec.engines)
    }
    router_values(spec, urls, {})


def member_values(
    engine: "EngineSpec", url: str, events: Mapping[str, EngineEvents] | None = None
) -> Values:
    """An engine as the router's settings announce it."""
    found: Values = {"url": url, "name": engine.name}
    if engine.role != "serve":
        found["role"] = engine.role
    if events and engine.name in events:
        found["events"] = msgspec.to_builtins(events[engine.name])
    return found


def on_demand_values(spec: "StackSpec", urls: Mapping[str, str]) -> Values | None:
    """Engines that start at their first request, and where the router asks for them."""
    listed = [
        {
            **member_values(engine, urls[engine.name]),
            "models": [spec.served_name_of(engine)],
            "idle_stop_s": engine.idle_stop_s,
            "start_wait_s": engine.start_wait_s,
        }
        for engine in spec.engines
        if engine.on_demand
    ]
    return {"socket": spec.on_demand_socket_path, "engines": listed} if listed else None


def transport_of(spec: "StackSpec") -> str | None:
    """How blocks get from prefill to decode engines; None where no engine has a role."""
    with_role = [engine for engine in spec.engines if engine.role != "serve"]
    if not with_role:
        if spec.router is not None and spec.router.handoff:
            raise InputError(
                "router.handoff: no engine has a role; give some role: prefill and others "
                "role: decode, or leave handoff out."
            )
        return None
    started = [engine.connector for engine in with_role if engine.url is None]
    ours = {"kvkeep": "pool", "nixl": "nixl"}
    own = {
        ours[connector] for connector in started if isinstance(connector, str) and connector in ours
    }
    named = spec.router.handoff.get("transport") if spec.router is not None else None
    if len(own) > 1 or (own and named is not None and own != {named}):
        raise InputError(
            "engines with a role: all need the connector of one transport, kvkeep (transport pool) "
            "or nixl; give them the same."
        )
    return own.pop() if own else str(named or "pool")


def _check_roles(spec: "StackSpec") -> None:
    roles = {engine.role for engine in spec.engines}
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if role in roles and other not in roles:
            raise InputError(
                f"engines: there is a role {role} and no {other}, and one is nothing without the "
                f"other; give an engine role: {other}, or none a role."
            )


def _check_events(spec: "StackSpec", router: RouterSpec) -> None:
    if not router.events:
        return
    if router.policy != "prefix_aware":
        raise InputError(
            f"router.events: policy {router.policy} has no use for them; set policy: prefix_aware."
        )
    started = [engine for engine in spec.engines if engine.url is None]
    kinds = {(spec.model_of(engine), engine.block_tokens) for engine in started}
    if len(kinds) != 1:
        raise InputError(
            "router.events: engines that tell of their blocks need one model and one block_tokens; "
            "give all the same, or leave events out."
        )


def _check_engine(spec: "StackSpec", engine: "EngineSpec", field: str) -> None:
    if engine.role != "serve" and spec.router is None:
        raise InputError(
            f"{field}.role = {engine.role}: a router hands requests from prefill to decode; write "
            "a section router, or leave role out."
        )
    if not engine.on_demand:
        return
    if spec.router is None:
        raise InputError(
            f"{field}.on_demand: a router starts engines on demand; write a section router, "
            "or leave on_demand out."
        )
    if engine.role != "serve":
        raise InputError(
            f"{field}.on_demand: an engine with role {engine.role} is one of a pair that is asked "
            "together; leave on_demand out, or the role."
        )
    if engine.url is not None:
        raise InputError(
            f"{field}.on_demand: the engine at {engine.url} runs already; leave one of the two out."
        )
    model = spec.served_name_of(engine)
    others = [
        other.name
        for other in spec.engines
        if other.on_demand and other is not engine and spec.served_name_of(other) == model
    ]
    if others:
        raise InputError(
            f"{field}.on_demand: engine {others[0]} starts on demand for {model} too; "
            "one engine for each model does."
        )


def whole_router_paths(router: RouterSpec) -> RouterSpec:
    """The router runs in the state folder, and must mean the user's paths."""
    settings = dict(router.settings)
    sections: dict[str, Values] = {"limits": dict(router.limits), "": settings}
    for name in ("etcd", "cartridges"):
        is_there = isinstance(settings.get(name), dict)
        sections[name] = dict(settings[name]) if is_there else {}
        if is_there:
            settings[name] = sections[name]
    for path in _FILES:
        section = sections["".join(path[:-1])]
        if file := section.get(path[-1]):
            section[path[-1]] = os.path.abspath(os.path.expanduser(str(file)))
    return msgspec.structs.replace(router, limits=sections["limits"], settings=settings)


def environment_fields(environment: Mapping[str, str], prefix: str) -> Values:
    """Fields of the section that the router's own variables set."""
    found: Values = {}
    for field in set(RouterSettings.__struct_fields__).difference(SECTIONS):
        text = environment.get(prefix + field.upper(), "").strip()
        if text:
            place = "" if field in RouterSpec.__struct_fields__ else "settings."
            found[f"router.{place}{field}"] = text
    return found
