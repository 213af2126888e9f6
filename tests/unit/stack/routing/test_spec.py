"""What a stack file may say of its router, and what the router is told."""

from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.settings import load_settings
from kvkeep.router.snapshot import Role
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.routing.spec import router_values, whole_router_paths
from kvkeep.stack.spec import StackSpec

PAIR = [{"name": "p", "role": "prefill"}, {"name": "d", "role": "decode"}]


def spec(engines: list[dict[str, Any]] | None = None, **router: Any) -> StackSpec:
    values = {"router": router, "engines": engines or [{"name": "a"}, {"name": "b"}]}
    return make_spec(values, environment={})


def told(stack: StackSpec, **more: Any) -> dict[str, Any]:
    urls = {engine.name: f"http://127.0.0.1:{idx + 1}" for idx, engine in enumerate(stack.engines)}
    return router_values(stack, urls, more)


def test_the_router_gets_its_engines_and_its_settings() -> None:
    """What the section says is what the router reads."""
    stack = spec(
        policy="least_loaded",
        drain_s=3,
        limits={"in_flight_max": 7},
        settings={"health": {"interval_s": 9.0}, "relay": {"idle_s": 5.0}},
    )

    settings = load_settings(None, {}, told(stack, port=8080))

    assert [(each.name, each.url) for each in settings.engines] == [
        ("a", "http://127.0.0.1:1"),
        ("b", "http://127.0.0.1:2"),
    ]
    assert (settings.policy, settings.port) == ("least_loaded", 8080)
    assert (settings.limits.in_flight_max, settings.health.interval_s) == (7, 9.0)
    assert (settings.relay.drain_s, settings.relay.idle_s) == (3.0, 5.0)


def test_a_section_of_which_nothing_is_said_is_a_router() -> None:
    """`router:` alone in a file means one with defaults, `--set router=null` none."""
    values: dict[str, Any] = {"router": None, "engines": [{"name": "a"}]}

    assert make_spec(values, environment={}).router is not None
    assert make_spec(values, ["router=null"], environment={}).router is None
    assert make_spec({"engines": [{"name": "a"}]}, environment={}).router is None


def test_the_router_s_own_variables_count() -> None:
    """Where the file has a router they set its fields, and nothing elsewhere."""
    environment = {"KVKEEP_ROUTER_PORT": "8099", "KVKEEP_ROUTER_ENGINE_DRAIN_S": "7"}
    values: dict[str, Any] = {"engines": [{"name": "a"}]}
    found = make_spec(values | {"router": {"port": 1}}, environment=environment)

    assert found.router is not None
    assert found.router.port == 8099
    assert load_settings(None, {}, told(found)).engine_drain_s == 7.0
    assert make_spec(values, environment=environment).router is None


def test_an_engine_on_demand_is_not_there_from_the_start() -> None:
    """The router knows its model, where to ask for it, and when to have it stopped."""
    engine = {"name": "c", "on_demand": True, "idle_stop_s": 60, "served_model_name": "later"}
    stack = spec([{"name": "a"}, {**engine, "start_wait_s": 9}])

    settings = load_settings(None, {}, told(stack))

    assert [each.name for each in settings.engines] == ["a"]
    assert settings.on_demand is not None
    (found,) = settings.on_demand.engines
    assert (found.title, found.models, found.idle_stop_s) == ("c", ["later"], 60.0)
    assert found.start_wait_s == 9.0
    assert settings.on_demand.socket == stack.on_demand_socket_path


def test_a_stack_of_engines_on_demand_only_is_one() -> None:
    """Nothing has to run for an address to be there."""
    stack = spec([{"name": "c", "on_demand": True}])

    assert load_settings(None, {}, told(stack)).engines == []


def test_each_engine_may_have_a_model_of_its_own() -> None:
    """Clients ask for it as it was given, or by its own name."""
    stack = spec([{"name": "a"}, {"name": "b", "model": "o/m"}, {"name": "c", "model": "o/m",
                  "served_model_name": "n"}])  # fmt: skip

    assert [stack.model_of(each) for each in stack.engines] == ["smollm2", "o/m", "o/m"]
    assert [stack.served_name_of(each) for each in stack.engines] == ["smollm2", "o/m", "n"]
    assert stack.models == ["smollm2", "o/m"]


def test_paths_are_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router runs elsewhere, and finds the same files."""
    monkeypatch.chdir(tmp_path)
    etcd = {"urls": ["https://h:1"], "ca_file": "ca.pem"}
    settings = {"admin_key_file": "k", "etcd": etcd, "cartridges": {"library": "carts"}}
    section = spec(limits={"keys_file": "keys.yaml"}, settings=settings).router
    assert section is not None

    whole = whole_router_paths(section)

    assert whole.limits == {"keys_file": str(tmp_path / "keys.yaml")}
    assert whole.settings == {
        "admin_key_file": str(tmp_path / "k"),
        "etcd": {"urls": ["https://h:1"], "ca_file": str(tmp_path / "ca.pem")},
        "cartridges": {"library": str(tmp_path / "carts")},
    }


ON_DEMAND = {"name": "b", "on_demand": True}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"router": {"policy": "best"}}, "router.policy = best: "),
    ({"router": {"polcy": "x"}}, "router.polcy: there is no such field; did you mean policy?"),
    (
        {"router": {"settings": {"port": 1}}},
        "router.settings.port: write it as router.port instead.",
    ),
    (
        {"router": {"settings": {"engines": []}}},
        "router.settings.engines: write it as engines instead.",
    ),
    (
        {"router": {"settings": {"relay": {"drain_s": 1}}}},
        "router.settings.relay.drain_s: write it as router.drain_s instead.",
    ),
    ({"router": {"settings": {"x": 1}}}, "router: 'x' is not a setting of the router"),
    ({"router": {"limits": {"queue_max": -1}}}, "limits.queue_max"),
    (
        {"router": {"port": 7000}, "daemon": {"metrics_port": 7000}},
        "router.port = 7000: daemon.metrics_port is the same",
    ),
    (
        {"router": {"port": 7000, "admin_port": 7000}},
        "router.admin_port = 7000: router.port is the same",
    ),
    (
        {"router": {}, "engines": [{"name": "a", "url": "https://h:1"}]},
        "'https://h:1' is not an engine's address",
    ),
    ({"engines": [{"name": "a"}, ON_DEMAND]}, "engines[1].on_demand: a router starts engines"),
    (
        {"router": {}, "engines": [ON_DEMAND | {"url": "http://h:1"}]},
        "engines[0].on_demand: the engine at http://h:1 runs already",
    ),
    (
        {"router": {}, "engines": [ON_DEMAND, ON_DEMAND | {"name": "c"}]},
        "engines[0].on_demand: engine c starts on demand for smollm2 too",
    ),
    (
        {"router": {}, "engines": [*PAIR, ON_DEMAND | {"role": "decode"}]},
        "engines[2].on_demand: an engine with role decode is one of a pair",
    ),
    ({"engines": PAIR}, "engines[0].role = prefill: a router hands requests"),
    ({"router": {}, "engines": PAIR[:1]}, "engines: there is a role prefill and no decode"),
    ({"router": {"handoff": {"min_tokens": 1}}}, "router.handoff: no engine has a role"),
    ({"router": {"events": True}}, "router.events: policy round_robin has no use for them"),
    (
        {
            "router": {"events": True, "policy": "prefix_aware"},
            "engines": [{"name": "a"}, {"name": "b", "model": "o/m"}],
        },
        "router.events: engines that tell of their blocks need one model",
    ),
]


@pytest.mark.parametrize(("values", "sentence"), WRONG, ids=[each[1][:40] for each in WRONG])
def test_a_wrong_router_is_one_sentence(values: dict[str, Any], sentence: str) -> None:
    """The field and the mend, before anything is started."""
    with pytest.raises(InputError) as caught:
        make_spec({"engines": [{"name": "a"}]} | values, environment={})

    assert sentence in str(caught.value)


@pytest.mark.parametrize(("connector", "transport"), [("kvkeep", "pool"), ("nixl", "nixl")])
def test_the_transport_follows_from_the_connectors(connector: str, transport: str) -> None:
    """What engines can do decides how blocks get from one to the other."""
    engines = [engine | {"connector": connector} for engine in PAIR]
    settings = load_settings(None, {}, told(spec(engines, handoff={"min_tokens": 9})))

    assert [each.role for each in settings.engines] == [Role.PREFILL, Role.DECODE]
    assert settings.handoff is not None
    assert (settings.handoff.transport, settings.handoff.min_tokens) == (transport, 9)


@pytest.mark.parametrize(
    ("connectors", "handoff"), [(("kvkeep", "nixl"), {}), (("nixl", "nixl"), {"transport": "pool"})]
)
def test_two_transports_are_refused(connectors: tuple[str, str], handoff: dict[str, Any]) -> None:
    """Engines that can't fetch from each other are no pair."""
    engines = [engine | {"connector": c} for engine, c in zip(PAIR, connectors, strict=True)]

    with pytest.raises(InputError, match="all need the connector of one transport"):
        spec(engines, handoff=handoff)
