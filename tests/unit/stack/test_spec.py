"""Paths and defaults that follow from a stack's values."""

from pathlib import Path

import msgspec
import pytest

from kvkeep.daemon.settings import SOCKET_PATH_BYTES_MAX
from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.routing.spec import RouterSpec
from kvkeep.stack.spec import DaemonSpec, EngineSpec, StackSpec, check_spec, default_state_dir


def spec(**fields: object) -> StackSpec:
    return msgspec.structs.replace(StackSpec(name="s", engines=[EngineSpec(name="a")]), **fields)


def test_the_socket_lies_in_the_state_folder(tmp_path: Path) -> None:
    """Two stacks never share a socket by accident."""
    assert spec(state_dir=str(tmp_path)).socket_path == str(tmp_path / "daemon.sock")


def test_a_long_state_folder_gives_a_socket_elsewhere(tmp_path: Path) -> None:
    """A path that Unix sockets can't have is not used."""
    found = spec(state_dir=str(tmp_path / ("x" * 120))).socket_path

    assert len(found.encode()) <= SOCKET_PATH_BYTES_MAX
    assert found.endswith("/s.sock")


def test_a_named_socket_is_taken() -> None:
    """A socket in the file is used as it is."""
    assert spec(daemon=DaemonSpec(socket="/run/k.sock")).socket_path == "/run/k.sock"


def test_a_stack_without_a_folder_gets_one_by_its_name() -> None:
    """`kvkeep down NAME` finds the folder without the file."""
    assert spec().state_path == default_state_dir("s")


@pytest.mark.parametrize(
    ("fields", "name"),
    [({}, "smollm2"), ({"model": "o/m"}, "o/m"), ({"served_model_name": "x"}, "x")],
)
def test_clients_ask_for_the_model_as_it_was_named(fields: dict[str, str], name: str) -> None:
    """The served name is the model's unless another is given."""
    assert spec(**fields).model_name == name


def test_the_daemon_gets_its_settings() -> None:
    """What the file says about the daemon is what the daemon is told."""
    daemon = DaemonSpec(pool_bytes=1 << 26, socket="/run/k.sock", settings={"sessions_max": 5})

    settings = spec(daemon=daemon).daemon_settings(metrics_port=9400)

    assert (settings.pool_bytes, settings.socket, settings.metrics_port, settings.sessions_max) == (
        1 << 26,
        "/run/k.sock",
        9400,
        5,
    )


def test_the_daemon_tells_a_router_that_asks(tmp_path: Path) -> None:
    """What it keeps can be heard at a socket of the stack's, or at one of the user's."""
    asking = spec(state_dir=str(tmp_path), router=RouterSpec(policy="prefix_aware", events=True))
    named = DaemonSpec(settings={"events_socket": "/run/e.sock"})

    assert spec(router=RouterSpec()).daemon_settings().events_socket == ""
    assert asking.daemon_settings().events_socket == str(tmp_path / "events.sock")
    assert asking.events_socket_path == str(tmp_path / "events.sock")
    own = msgspec.structs.replace(asking, daemon=named)
    assert own.daemon_settings().events_socket == own.events_socket_path == "/run/e.sock"


def test_a_raw_connector_is_not_ours() -> None:
    """Only an engine with kvkeep's own connector needs the daemon."""
    raw = EngineSpec(name="a", connector={"kv_connector": "Other"})

    assert (EngineSpec(name="a").uses_kvkeep, raw.uses_kvkeep) == (True, False)


@pytest.mark.parametrize(
    ("field", "one", "other"), [("block_tokens", 32, 64), ("dtype", "bfloat16", "float32")]
)
def test_engines_of_one_daemon_must_agree(field: str, one: object, other: object) -> None:
    """Two layouts in one pool are refused before anything starts, with the field and the mend."""
    engines = [{"name": "a", field: one}, {"name": "b", field: other}]

    with pytest.raises(
        InputError, match=rf"engines\[1\]\.{field} = {other}: engines\[0\] has {one}"
    ):
        make_spec({"name": "x", "engines": engines})


def _server(kind: str, port: int) -> dict[str, object]:
    size = "segment_bytes" if kind == "mooncake" else "capacity_bytes"
    return {"kind": kind, "start": True, "port": port, size: "64MiB"}


@pytest.mark.parametrize(
    ("daemon", "port", "said"),
    [
        (
            DaemonSpec(tiers=[_server("valkey", 7), _server("mooncake", 7)]),
            0,
            "daemon.tiers[1].port = 7: daemon.tiers[0].port is the same",
        ),
        (
            DaemonSpec(metrics_port=7, tiers=[_server("valkey", 7)]),
            0,
            "daemon.tiers[0].port = 7: daemon.metrics_port is the same",
        ),
        (
            DaemonSpec(tiers=[_server("valkey", 7)]),
            7,
            "daemon.tiers[0].port = 7: engines[0].port is the same",
        ),
    ],
)
def test_two_servers_on_one_port_are_refused(daemon: DaemonSpec, port: int, said: str) -> None:
    """Servers of tiers, the daemon and engines alike; without a port each gets one of its own."""
    engines = [EngineSpec(name="a", port=port)]
    with pytest.raises(InputError) as caught:
        check_spec(StackSpec(name="s", engines=engines, daemon=daemon))

    assert str(caught.value) == f"{said}; choose another, or 0 for a free one."
    free = [{**tier, "port": 0} for tier in daemon.tiers]
    check_spec(StackSpec(name="s", engines=engines, daemon=DaemonSpec(tiers=free)))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], 1),
        (["--data-parallel-size", "2"], 2),
        (["--eager", "--data_parallel_size=4"], 4),
        (["-dp", "3", "--seed", "1"], 3),
        (["--seed", "2", "--data-parallel-size"], 1),
    ],
)
def test_ranks_with_caches_of_their_own_stand_in_the_arguments(
    args: list[str], expected: int
) -> None:
    """As vLLM reads them."""
    assert EngineSpec(name="a", args=args).num_data_parallel == expected
