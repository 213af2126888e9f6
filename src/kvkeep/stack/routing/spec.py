"""What a stack file says of its router, and what the router is told in its own settings."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.router.settings import SECTIONS, PolicyName, Port, RouterSettings, load_settings

if TYPE_CHECKING:
    from kvkeep.stack.spec import EngineSpec, StackSpec

SETTINGS = "router.settings"
_FILES = (("admin_key_file",), ("engines_file",), ("limits", "keys_file"))
"""Settings that name a file of the user's."""

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
    settings: dict[str, Any] = {}
    """Any further setting of the router, passed on."""


def router_values(
    router: RouterSpec,
    members: Sequence[Values],
    *,
    on_demand: Values | None = None,
    ports: tuple[int, int] | None = None,
) -> Values:
    """What the router is told, as its settings file says it.

    Args:
        router: Of the stack.
        members: Engines that are there from the start, as `kvkeep.router` announces them.
        on_demand: Engines that start at their first request, and where to ask for them.
        ports: Of clients and of the admin, instead of the section's.

    Raises:
        InputError: ``router.settings`` holds something the router does not take.
    """
    port, admin_port = ports or (router.port, router.admin_port)
    own: Values = {
        "policy": router.policy,
        "host": router.host,
        "port": port,
        "admin_port": admin_port,
        "limits": router.limits,
        "engines": list(members),
    }
    if on_demand is not None:
        own["on_demand"] = on_demand
    places = {field: f"router.{field}" for field in own} | {
        "engines": "engines",
        "on_demand": "engines",
    }
    for field in places.keys() & router.settings.keys():
        raise InputError(f"{SETTINGS}.{field}: write it as {places[field]} instead.")
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
    placed = [
        {"url": engine.url or f"http://127.0.0.1:{idx + 1}", "name": engine.name}
        for idx, engine in enumerate(spec.engines)
    ]
    router_values(spec.router, placed)


def _check_engine(spec: "StackSpec", engine: "EngineSpec", field: str) -> None:
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


def with_whole_paths(router: RouterSpec) -> RouterSpec:
    """The router runs in the state folder, and must mean the user's paths."""
    sections: dict[str, Values] = {"limits": dict(router.limits), "": dict(router.settings)}
    for path in _FILES:
        section = sections["".join(path[:-1])]
        if file := section.get(path[-1]):
            section[path[-1]] = os.path.abspath(os.path.expanduser(str(file)))
    return msgspec.structs.replace(router, limits=sections["limits"], settings=sections[""])


def environment_fields(environment: Mapping[str, str], prefix: str) -> Values:
    """Fields of the section that the router's own variables set."""
    found: Values = {}
    for field in set(RouterSettings.__struct_fields__).difference(SECTIONS):
        text = environment.get(prefix + field.upper(), "").strip()
        if text:
            place = "" if field in RouterSpec.__struct_fields__ else "settings."
            found[f"router.{place}{field}"] = text
    return found
