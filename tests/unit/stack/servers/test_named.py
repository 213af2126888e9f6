"""Servers that a stack file names: ports in texts, and what is refused."""

from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.servers.named import told, with_server_ports
from kvkeep.stack.spec import StackSpec, named_ports, with_whole_paths

SERVER: dict[str, Any] = {
    "name": "cache",
    "command": ["cached", "--port={cache.rpc}", "{cache.rpc}"],
    "ports": {"rpc": 0, "http": 9000},
    "ready": "http/health",
}


def spec_of(server: dict[str, Any] | None = None, **engine: Any) -> StackSpec:
    fields = {"name": "a", "connector": "none", **engine}
    servers = [{**SERVER, **(server or {})}]
    values = {"daemon": {"enabled": False}, "servers": servers, "engines": [fields]}
    return make_spec(values, environment={})


def test_ports_stand_in_whatever_is_told() -> None:
    """Commands and variables get text; connectors and files a number where nothing else stands."""
    spec = spec_of(
        {"env": {"WHERE": "http://127.0.0.1:{cache.http}"}},
        connector={"kv_connector": "X", "port": "{cache.rpc}", "all": ["at {cache.rpc}"]},
        env={"PORT": "{cache.rpc}"},
        args=["--x={cache.http}"],
        files={"x.json": {"port": "{cache.http}"}, "x.txt": "to {cache.rpc}"},
    )

    filled = with_server_ports(spec, lambda: 7001)

    (server,), (engine,) = filled.servers, filled.engines
    assert server.ports == {"rpc": 7001, "http": 9000}
    assert server.command == ["cached", "--port=7001", "7001"]
    assert server.env == {"WHERE": "http://127.0.0.1:9000"}
    assert engine.connector == {"kv_connector": "X", "port": 7001, "all": ["at 7001"]}
    assert (engine.env, engine.args) == ({"PORT": "7001"}, ["--x=9000"])
    assert engine.files == {"x.json": {"port": 9000}, "x.txt": "to 7001"}


def test_what_names_no_server_is_left_alone() -> None:
    """Braces mean something else in templates and in JSON."""
    assert told("{a.b} {{x}} {cache.rpc}", {"cache": {"rpc": 1}}) == "{a.b} {{x}} 1"
    spec = make_spec({"engines": [{"name": "a", "args": ["--t={m.c}"]}]}, environment={})
    assert with_server_ports(spec, lambda: 1) is spec


def test_ports_that_the_file_names_are_looked_at() -> None:
    """As the ports of everything else: none twice, none that another program has."""
    assert named_ports(spec_of()) == {"servers[0].ports.http": 9000}
    with pytest.raises(InputError, match=r"servers\[0\]\.ports\.http = 9000: .* is the same"):
        spec_of(port=9000)


def test_a_program_with_a_path_is_found_from_the_state_folder(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path counts from where the user is; a bare name is looked for later."""
    monkeypatch.chdir(tmp_path)
    whole = with_whole_paths(spec_of({"command": ["env/cached"]}, python="env/python"))

    assert whole.servers[0].command == [str(tmp_path / "env/cached")]
    assert whole.engines[0].python == str(tmp_path / "env/python")
    assert with_whole_paths(spec_of()).servers[0].command[0] == "cached"


@pytest.mark.parametrize(
    ("server", "engine", "said"),
    [
        ({"name": "a"}, {}, r"servers\[0\]\.name = a: something else"),
        ({"name": "daemon"}, {}, r"servers\[0\]\.name = daemon: something else"),
        ({"name": "a.b"}, {}, r"servers\[0\]\.name"),
        ({"command": []}, {}, r"servers\[0\]\.command"),
        ({"ready": "grpc"}, {}, "it has no port 'grpc'"),
        ({"prots": {}}, {}, r"servers\[0\]\.prots: .* did you mean ports"),
        ({}, {"args": ["{cache.grpc}"]}, r"engines\[0\]\.args: \{cache\.grpc\} is the port of no"),
        ({}, {"files": {"daemon.yaml": ""}}, "there can be no such file"),
        ({}, {"files": {"../x": ""}}, "there can be no such file"),
        ({}, {"files": {"trtllm.yaml": "text"}}, "write options by name"),
        ({}, {"python": "python3"}, r"engines\[0\]\.python = python3: write a path"),
    ],
)
def test_what_cannot_be_is_refused(
    server: dict[str, Any], engine: dict[str, Any], said: str
) -> None:
    """One sentence names the field and the mend."""
    with pytest.raises(InputError, match=said):
        spec_of(server, **engine)


def test_two_engines_may_not_write_one_file_differently() -> None:
    """They run in one folder."""
    engines = [{"name": name, "connector": "none", "files": {"x": name}} for name in ("a", "b")]
    with pytest.raises(InputError, match=r"engines\[1\]\.files\.x: another engine"):
        make_spec({"engines": engines}, environment={})
