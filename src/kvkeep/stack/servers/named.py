"""Servers that a stack file names itself: what its engines' connectors need, such as another cache.

Values and checks only. Ports are chosen when the stack starts; until then a text such as
``{cache.rpc}`` stands for the port ``rpc`` of the server ``cache``, in what servers and engines are
told.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.router.settings import Port

if TYPE_CHECKING:
    from kvkeep.stack.spec import EngineSpec, StackSpec

Ports = Mapping[str, Mapping[str, int]]
"""Numbers by server and by their name there."""

_PLACE = re.compile(r"\{([A-Za-z0-9][A-Za-z0-9_-]*)\.([A-Za-z0-9][A-Za-z0-9_-]*)\}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_OWN_NAMES = ("daemon", "router")
"""Of logs in the state folder."""
_OWN_FILES = ("daemon.yaml", "router.yaml", "stack.json", "stack.lock", "stack.partial")
TRTLLM_OPTIONS = "trtllm.yaml"
"""Among an engine's files: further options of TensorRT-LLM."""
_TOLD = ("connector", "args", "env", "files")
"""Fields of an engine in which ports may stand."""


class ServerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A program that starts before the engines and stops after them."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    """What the stack calls it; letters, digits, dashes and underscores."""
    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    """Program and arguments. A program without a slash is looked for beside kvkeep's own, then in
    ``PATH``."""
    ports: dict[str, Port] = {}
    """Its TCP ports by name, 0 for a free one. ``{server.port}`` stands for the number in commands
    and ``env``, and in engines' ``connector``, ``args``, ``env`` and ``files``."""
    ready: str = ""
    """When it is ready: a port's name, which then takes connections, or a page such as
    ``http/health``, which then answers; left out: at once."""
    env: dict[str, str] = {}
    """Further environment variables of it."""


def ready_of(server: ServerSpec) -> tuple[str, str]:
    """Name of the port that tells, and the page's path; either may be empty."""
    port, slash, path = server.ready.partition("/")
    return port, slash + path


def named_server_ports(servers: Sequence[ServerSpec]) -> dict[str, int]:
    """Ports that the file asks for, by field; 0 where it takes a free one."""
    return {
        f"servers[{idx}].ports.{name}": port
        for idx, server in enumerate(servers)
        for name, port in server.ports.items()
    }


def check_servers(spec: "StackSpec") -> None:
    """Check what a file says of servers, and of what engines are told of them.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    taken = {engine.name for engine in spec.engines} | set(_OWN_NAMES)
    for idx, server in enumerate(spec.servers):
        field = f"servers[{idx}]"
        if server.name in taken:
            raise InputError(
                f"{field}.name = {server.name}: something else of the stack has this name; give "
                "each its own."
            )
        taken.add(server.name)
        port, _ = ready_of(server)
        if server.ready and port not in server.ports:
            raise InputError(
                f"{field}.ready = {server.ready}: it has no port {port!r}; name one of its ports."
            )
    known = {server.name: server.ports for server in spec.servers}
    for field, text in _texts(spec):
        for name, port in _PLACE.findall(text):
            if name in known and port not in known[name]:
                raise InputError(
                    f"{field}: {{{name}.{port}}} is the port of no server; {name} has "
                    f"{', '.join(known[name]) or 'none'}."
                )
    _check_files(spec.engines)


def _check_files(engines: Sequence["EngineSpec"]) -> None:
    """All engines run in one folder, with the stack's own files."""
    texts: dict[str, Any] = {}
    for idx, engine in enumerate(engines):
        for name, text in engine.files.items():
            field = f"engines[{idx}].files.{name}"
            is_own = name in _OWN_FILES or name.endswith(".trtllm.yaml")
            if is_own or not _FILE_NAME.fullmatch(name):
                raise InputError(f"{field}: there can be no such file; choose another name.")
            if name == TRTLLM_OPTIONS and not isinstance(text, dict):
                raise InputError(f"{field}: write options by name, not text.")
            if texts.setdefault(name, text) != text:
                raise InputError(
                    f"{field}: another engine has other text under this name, and both run in one "
                    "folder; choose another name."
                )


def _texts(spec: "StackSpec") -> Iterator[tuple[str, str]]:
    """Every text in which a port may stand, with its field."""
    for idx, server in enumerate(spec.servers):
        for name in ("command", "env"):
            for text in _inner(getattr(server, name)):
                yield f"servers[{idx}].{name}", text
    for idx, engine in enumerate(spec.engines):
        for name in _TOLD:
            for text in _inner(getattr(engine, name)):
                yield f"engines[{idx}].{name}", text


def _inner(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from _inner(each)
        case list():
            for each in value:
                yield from _inner(each)


def with_server_ports(spec: "StackSpec", take_port: Callable[[], int]) -> "StackSpec":
    """Choose the ports of named servers; from here on every text has the numbers."""
    if not spec.servers:
        return spec
    servers = [
        msgspec.structs.replace(
            server, ports={name: port or take_port() for name, port in server.ports.items()}
        )
        for server in spec.servers
    ]
    ports = {server.name: server.ports for server in servers}
    return msgspec.structs.replace(
        spec,
        servers=[
            msgspec.structs.replace(
                server, command=_texts_told(server.command, ports), env=told(server.env, ports)
            )
            for server in servers
        ],
        engines=[_engine_told(engine, ports) for engine in spec.engines],
    )


def _engine_told(engine: "EngineSpec", ports: Ports) -> "EngineSpec":
    return msgspec.structs.replace(
        engine,
        connector=told(engine.connector, ports, numbers=True),
        args=_texts_told(engine.args, ports),
        env=told(engine.env, ports),
        files=told(engine.files, ports, numbers=True),
    )


def _texts_told(texts: Sequence[str], ports: Ports) -> list[str]:
    return [str(told(text, ports)) for text in texts]


def told(value: Any, ports: Ports, *, numbers: bool = False) -> Any:
    """A copy of plain values with the ports in place.

    Args:
        value: Texts, numbers, lists and mappings.
        ports: Of named servers; what names none of them is left as it is.
        numbers: A text that is one port and nothing else becomes a number, as JSON's readers want.
    """
    match value:
        case dict():
            return {name: told(each, ports, numbers=numbers) for name, each in value.items()}
        case list():
            return [told(each, ports, numbers=numbers) for each in value]
        case str():
            whole = _PLACE.fullmatch(value)
            if numbers and whole and whole[1] in ports:
                return ports[whole[1]][whole[2]]
            return _PLACE.sub(lambda found: _number(found, ports), value)
    return value


def _number(found: re.Match[str], ports: Ports) -> str:
    return str(ports[found[1]][found[2]]) if found[1] in ports else found[0]
