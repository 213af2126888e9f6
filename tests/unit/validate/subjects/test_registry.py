"""Kinds of subjects: each is found by its own signs, and its examples begin it."""

import json
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.engines import Placement, launch_engine
from kvkeep.stack.models import Model
from kvkeep.stack.precedence import load_spec
from kvkeep.stack.servers.named import with_server_ports
from kvkeep.validate.settings import CheckSettings, resolve
from kvkeep.validate.started import _big_engines
from kvkeep.validate.subjects.base import Kind, Signs
from kvkeep.validate.subjects.hooks import Hooks
from kvkeep.validate.subjects.registry import KINDS, find_kind, hooks_for, named_kind
from kvkeep.validate.subjects.signs import signs_in_file

EXAMPLES = Path(__file__).parents[4] / "examples"
FILES = sorted(EXAMPLES.glob("subjects/*.yaml"))
MODEL = Model(location="/models/m", is_local=True)


@pytest.mark.parametrize(
    ("signs", "name"),
    [
        (Signs("vllm", ()), "vllm"),
        (Signs("vllm", ("KvkeepConnector",)), "kvkeep"),
        (Signs("vllm", ("MultiConnector", "NixlConnector", "KvkeepConnector")), "kvkeep"),
        (Signs("vllm", ("LMCacheMPConnector",)), "lmcache"),
        (Signs("vllm", ("MooncakeStoreConnector",)), "mooncake"),
        (Signs("vllm", ("NixlConnector",)), "nixl"),
        (Signs("vllm", ("OffloadingConnector",)), "offloading"),
        (Signs("trtllm", None), "trtllm"),
        (Signs("vllm", ("DynamoConnector",)), "generic"),
        (Signs("vllm", None), "generic"),
        (Signs(), "generic"),
    ],
)
def test_each_kind_is_found_by_its_signs(signs: Signs, name: str) -> None:
    """What nobody knows is asked and counted as vLLM is."""
    assert find_kind(signs).name == name


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_the_examples_of_a_kind_are_of_it(kind: Kind) -> None:
    """A stack file that the table names begins the subject that it stands beside."""
    assert kind.examples
    for name in kind.examples:
        spec = load_spec(EXAMPLES / name, environment={})
        signs = signs_in_file(_big_engines(spec)[0])
        assert signs is not None
        assert find_kind(signs) is kind
        resolve({}, {}, spec.check)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_example_of_a_subject_is_in_the_table(file: Path) -> None:
    """None is left lying about."""
    assert f"subjects/{file.name}" in {name for kind in KINDS.values() for name in kind.examples}


def config_in(command: list[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(command[command.index("--kv-transfer-config") + 1])
    return found


def test_offloading_starts_vllms_own_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line that a GPU host runs; no host without one takes it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    spec = load_spec(EXAMPLES / "subjects/offloading.yaml", environment={})
    placement = Placement(spec=spec, model=MODEL, port=8201, socket="", gpu=True)

    launch = launch_engine(spec.engines[0], placement)

    assert config_in(launch.command) == {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 4 << 30},
    }
    assert "--kv-cache-memory-bytes" not in launch.command


def test_tensorrt_llm_starts_with_a_pool_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of the file are over those that follow from fields."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    spec = load_spec(EXAMPLES / "subjects/trtllm.yaml", environment={})
    placement = Placement(spec=spec, model=MODEL, port=8201, socket="", gpu=True)

    launch = launch_engine(spec.engines[0], placement)

    assert launch.command[:2] == ["trtllm-serve", "/models/m"]
    assert json.loads(launch.files["a.trtllm.yaml"]) == {
        "kv_cache_config": {
            "enable_block_reuse": True,
            "tokens_per_block": 32,
            "host_cache_size": 4 << 30,
        },
        "return_perf_metrics": True,
    }
    assert list(launch.files) == ["a.trtllm.yaml"]


def test_lmcaches_engine_is_told_where_its_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of the server is a number in the connector's configuration."""
    spec = load_spec(EXAMPLES / "subjects/lmcache.yaml", environment={})
    ports = iter((7001, 7002, 7003))
    spec = with_server_ports(spec, lambda: next(ports))
    placement = Placement(spec=spec, model=MODEL, port=8201, socket="")

    launch = launch_engine(spec.engines[0], placement)

    assert launch.command[0] == ".venv-peers/lmcache/bin/python"
    extra = config_in(launch.command)["kv_connector_extra_config"]
    assert extra == {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": 7001}
    assert "--shm-name=lmcache_7001" in spec.servers[0].command


def test_what_a_person_names_is_over_the_kinds_own() -> None:
    """A reset and counters of one's own; what is not named stays."""
    settings = CheckSettings(
        reset="PUT /flush", external_counters="hits", external_counter_tokens=16
    )

    hooks = hooks_for(named_kind("trtllm"), settings)

    assert (hooks.reset.method, hooks.reset.address) == ("PUT", "/flush")
    assert (hooks.outside.counters, hooks.outside.tokens_each) == (("hits",), 16)
    assert hooks_for(named_kind("lmcache"), CheckSettings()) == Hooks()
    assert not hooks_for(named_kind("trtllm"), CheckSettings()).reset.is_possible


def test_a_kind_that_is_none_is_refused() -> None:
    """With those that there are."""
    with pytest.raises(InputError, match="take one of kvkeep, lmcache"):
        named_kind("sglang")
