"""What a stack starts before its daemon."""

from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.servers.ports import HeldPorts
from kvkeep.stack.servers.starting import (
    check_programs,
    make_named_servers,
    make_tier_servers,
    with_chosen_ports,
)
from kvkeep.stack.spec import StackSpec

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
SERVER = {"name": "cache", "command": ["python3", "{cache.rpc}"], "ports": {"rpc": 0}}
VALKEY = {"kind": "valkey", "start": True, "capacity_bytes": 1 << 20}


def spec_of(enabled: bool = True, **engine: Any) -> StackSpec:
    fields = {"name": "a", "connector": "none", **engine}
    daemon = {"enabled": enabled, "tiers": [VALKEY]}
    return make_spec({"daemon": daemon, "servers": [SERVER], "engines": [fields]}, environment={})


@pytest.mark.parametrize(("enabled", "names"), [(True, ["valkey-server"]), (False, [])])
def test_servers_of_tiers_come_with_their_daemon(
    enabled: bool, names: list[str], tmp_path: Path
) -> None:
    """Those that the file names start in any case, each on ports that nobody else gets."""
    ports = HeldPorts()
    try:
        spec = with_chosen_ports(spec_of(enabled), ports)
        tiers = make_tier_servers(spec, ports, tmp_path, lambda: None)
        (cache,) = make_named_servers(spec, ports, tmp_path, lambda: None)
    finally:
        ports.let_all_go()

    assert [part.name for part in tiers] == names
    assert cache.how.launch.command[1:] == [str(cache.server.ports["rpc"])]
    assert cache.server.ports["rpc"] > 0


def test_an_interpreter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Before anything is started."""
    with pytest.raises(InputError, match=r"engine a: python = .*: there is no such program"):
        check_programs(spec_of(python=str(tmp_path / "none/python")))
