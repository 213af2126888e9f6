"""Command lines and environments, read as the engines would."""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.events.settings import EngineEvents
from kvkeep.stack import engines
from kvkeep.stack.engines import Placement, launch_daemon, launch_engine
from kvkeep.stack.models import Model
from kvkeep.stack.routing.spec import RouterSpec
from kvkeep.stack.spec import DaemonSpec, EngineSpec, StackSpec


@pytest.fixture(autouse=True)
def _everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


def launch(
    gpu: bool = False,
    is_local: bool = True,
    places: dict[str, Any] | None = None,
    **fields: Any,
) -> engines.Launch:
    engine = EngineSpec(**{"name": "a", "cpus": [0, 1]} | fields)
    router = RouterSpec(handoff={"offer_lease_s": 45.5})
    spec = StackSpec(name="s", engines=[engine], served_model_name="m", router=router)
    model = Model(location="/models/m", is_local=is_local)
    known: dict[str, Any] = {"port": 8201, "socket": "/run/k.sock", "gpu": gpu}
    placement = Placement(spec=spec, model=model, **known | (places or {}))
    return launch_engine(engine, placement)


def value_of(command: list[str], flag: str) -> str | None:
    return command[command.index(flag) + 1] if flag in command else None


def test_vllm_listens_on_loopback_only() -> None:
    """An engine with developer endpoints is reached from this host alone."""
    made = launch()

    assert made.command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value_of(made.command, "--host") == "127.0.0.1"
    assert made.environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert made.environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert made.environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model", "/models/m"),
        ("--served-model-name", "m"),
        ("--port", "8201"),
        ("--block-size", "64"),
        ("--max-model-len", "4096"),
        ("--max-num-seqs", "3"),
        ("--max-num-batched-tokens", "128"),
        ("--dtype", "float32"),
        ("--num-gpu-blocks-override", "20"),
        ("--kv-cache-memory-bytes", str(1 << 28)),
        ("--seed", "7"),
    ],
)
def test_vllm_gets_every_field(flag: str, value: str) -> None:
    """Each field of an engine reaches vLLM under its flag."""
    made = launch(
        block_tokens=64,
        max_model_len=4096,
        max_num_seqs=3,
        max_num_batched_tokens=128,
        dtype="float32",
        num_gpu_blocks_override=20,
        kv_cache_bytes=1 << 28,
        args=["--seed", "7"],
    )

    assert value_of(made.command, flag) == value


def test_what_is_not_said_is_left_to_vllm() -> None:
    """A field without a value gives no flag."""
    command = launch().command

    assert {"--dtype", "--max-num-seqs", "--tensor-parallel-size"}.isdisjoint(command)
    assert "--enable-prompt-tokens-details" in command


@pytest.mark.parametrize(("cartridges", "policy"), [(False, "recompute"), (True, "fail")])
def test_a_failed_load_is_recomputed_unless_that_would_be_nonsense(
    cartridges: bool, policy: str
) -> None:
    """Placeholders of a cartridge can't be recomputed, so there a failed load fails."""
    made = launch(cartridges=cartridges, connector_settings={"tenant": "t"})

    config = json.loads(value_of(made.command, "--kv-transfer-config") or "{}")
    extra = {"socket": "/run/k.sock", "tenant": "t"} | ({"cartridges": True} if cartridges else {})
    assert config == {
        "kv_connector": "KvkeepConnector",
        "kv_connector_module_path": "kvkeep.connector.plugin",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
    }


@pytest.mark.parametrize(
    ("connector", "config"),
    [("none", None), ({"kv_connector": "X"}, {"kv_connector": "X"})],
)
def test_another_connector_is_passed_on(connector: Any, config: Any) -> None:
    """No connector, or somebody else's, as the file says."""
    text = value_of(launch(connector=connector).command, "--kv-transfer-config")

    assert (json.loads(text) if text else None) == config


def test_a_cpu_engine_is_bound_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU an engine gets its cores and 1 GiB, whatever the surroundings say."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")

    made = launch()

    assert made.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert value_of(made.command, "--kv-cache-memory-bytes") == str(1 << 30)
    assert "VLLM_CPU_KVCACHE_SPACE" not in made.environment


def test_a_gpu_engine_takes_the_memory_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cores and memory are the engine's business."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)

    made = launch(gpu=True)

    assert "VLLM_CPU_OMP_THREADS_BIND" not in made.environment
    assert "--kv-cache-memory-bytes" not in made.command


@pytest.mark.parametrize("server", ["vllm", "trtllm"])
def test_an_engine_sees_its_own_gpus(server: str) -> None:
    """What it was given, unless its own environment says otherwise."""
    places = {"gpus": ("2", "3")}
    fields: dict[str, Any] = {"gpu": True, "server": server, "connector": "none"}

    assert launch(places=places, **fields).environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    own = launch(places=places, env={"CUDA_VISIBLE_DEVICES": "7"}, **fields)
    assert own.environment["CUDA_VISIBLE_DEVICES"] == "7"


def test_an_engine_computes_on_its_share_of_the_cores() -> None:
    """Where its fields name none; each of its ranks has as many."""
    made = launch(places={"cores": [2, 3, 4, 5]}, cpus=None, tensor_parallel=2)

    assert made.environment["VLLM_CPU_OMP_THREADS_BIND"] == "2,3|4,5"


@pytest.mark.parametrize(
    ("gpu", "device", "role", "kv_role"),
    [
        (False, "cpu", "prefill", "kv_producer"),
        (True, None, "decode", "kv_consumer"),
        (False, "cpu", "serve", "kv_both"),
    ],
)
def test_nixl_is_vllm_s_own(gpu: bool, device: str | None, role: str, kv_role: str) -> None:
    """Stock connector, with a port of this engine's own for its side channel."""
    made = launch(gpu=gpu, places={"side_channel_port": 5701}, connector="nixl", role=role)

    config = json.loads(value_of(made.command, "--kv-transfer-config") or "{}")
    assert (config["kv_connector"], config["kv_role"]) == ("NixlConnector", kv_role)
    assert config.get("kv_buffer_device") == device
    assert config["kv_connector_extra_config"] == {"kv_lease_duration": 45}  # the router's
    assert made.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5701"
    assert made.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"


def test_events_go_to_the_router_on_loopback() -> None:
    """The engine connects, for it would listen on every interface."""
    events = EngineEvents(publish="tcp://127.0.0.1:1", replay="tcp://127.0.0.1:2", bind=True)

    config = json.loads(
        value_of(launch(places={"events": events}).command, "--kv-events-config") or "{}"
    )

    assert config == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://127.0.0.1:1",
        "replay_endpoint": "tcp://127.0.0.1:2",
    }
    assert value_of(launch().command, "--kv-events-config") is None


@pytest.mark.parametrize("pool", ["", "ipc:///run/e.sock"])
def test_the_connector_announces_blocks_where_the_daemon_is_heard(pool: str) -> None:
    """Without that the router could not tell what the daemon's numbers stand for."""
    events = EngineEvents(publish="tcp://127.0.0.1:1", bind=True, pool=pool)

    config = json.loads(
        value_of(launch(places={"events": events}).command, "--kv-transfer-config") or "{}"
    )

    assert config["kv_connector_extra_config"].get("announce_blocks", False) == bool(pool)


def test_an_engine_is_called_by_its_own_model() -> None:
    """The name that its clients ask for."""
    assert value_of(launch(model="o/m").command, "--served-model-name") == "o/m"


def test_a_router_s_settings_are_in_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables have been heard already, and must not be heard again."""
    monkeypatch.setenv("KVKEEP_ROUTER_PORT", "9")

    made = engines.launch_router({"port": 8080})

    assert json.loads(made.files["router.yaml"]) == {"port": 8080}
    assert "KVKEEP_ROUTER_PORT" not in made.environment
    assert made.command[-3:] == ["route", "--config", "router.yaml"]


@pytest.mark.parametrize(("is_local", "offline"), [(True, "1"), (False, None)])
def test_a_local_model_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, is_local: bool, offline: str | None
) -> None:
    """An engine of a local model asks no hub."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    assert launch(is_local=is_local).environment.get("HF_HUB_OFFLINE") == offline


def test_the_file_s_environment_wins() -> None:
    """What the file says about the environment beats what kvkeep sets."""
    made = launch(env={"VLLM_SERVER_DEV_MODE": "0", "X": "y"})

    assert (made.environment["VLLM_SERVER_DEV_MODE"], made.environment["X"]) == ("0", "y")


def test_trtllm_serve_is_told_the_same() -> None:
    """The other engine's command line carries the fields under its own names."""
    made = launch(
        server="trtllm",
        connector="none",
        block_tokens=64,
        max_model_len=4096,
        max_num_seqs=3,
        max_num_batched_tokens=128,
        tensor_parallel=2,
        num_gpu_blocks_override=20,
    )

    options = json.loads(made.files["a.trtllm.yaml"])
    assert made.command == [
        *("trtllm-serve", "/models/m", "--host", "127.0.0.1", "--port", "8201"),
        *("--max_seq_len", "4096", "--max_batch_size", "3", "--max_num_tokens", "128"),
        *("--tp_size", "2", "--extra_llm_api_options", "a.trtllm.yaml"),
    ]
    assert options["kv_cache_config"] == {
        "enable_block_reuse": True,
        "tokens_per_block": 64,
        "max_tokens": 1280,
    }


@pytest.mark.parametrize(
    ("vllm", "trtllm", "server", "found"),
    [
        (True, True, "auto", "vllm"),
        (False, True, "auto", "trtllm"),
        (True, True, "trtllm", "trtllm"),
        (False, False, "auto", None),
        (False, True, "vllm", None),
        (True, False, "trtllm", None),
    ],
)
def test_the_program_that_is_installed_is_taken(
    monkeypatch: pytest.MonkeyPatch, vllm: bool, trtllm: bool, server: Any, found: str | None
) -> None:
    """Told or not, only an installed program is started; else one sentence says what to do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: vllm or None)
    monkeypatch.setattr("shutil.which", lambda name: "x" if trtllm else None)
    engine = EngineSpec(name="a", server=server)

    if found is None:
        with pytest.raises(InputError, match=r"engine a: .* is not installed here; install it"):
            engines.find_program(engine)
    else:
        assert engines.find_program(engine) == found


def test_the_daemon_reads_its_settings_from_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment was heard when the stack was settled, and is not heard twice."""
    monkeypatch.setenv("KVKEEP_POOL_BYTES", "1GiB")
    monkeypatch.setenv("KVKEEP_OTHER", "stays")
    daemon = DaemonSpec(pool_bytes=1 << 26, socket="/run/k.sock")
    spec = StackSpec(name="s", engines=[EngineSpec(name="a")], daemon=daemon)

    made = launch_daemon(spec, metrics_port=9400)

    settings = msgspec.yaml.decode(made.files["daemon.yaml"])
    assert made.command[1:] == ["-m", "kvkeep", "daemon", "--config", "daemon.yaml"]
    assert (settings["pool_bytes"], settings["metrics_port"]) == (1 << 26, 9400)
    assert "KVKEEP_POOL_BYTES" not in made.environment
    assert made.environment["KVKEEP_OTHER"] == "stays"


def test_kvkeep_is_importable_from_a_folder_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kvkeep is not installed, the engine finds it all the same."""

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    monkeypatch.setenv("PYTHONPATH", "/mine")

    sources = str(Path(engines.__file__).parents[2])
    assert launch().environment["PYTHONPATH"] == f"{sources}:/mine"


def test_an_engine_may_live_in_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interpreter is started, and finds its own programs first."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    made = launch(python="/other/bin/python")

    assert made.command[:2] == ["/other/bin/python", "-m"]
    assert made.environment["PATH"] == "/other/bin:/usr/bin"
    trtllm = launch(python="/other/bin/python", server="trtllm", connector="none")
    assert trtllm.command[0] == "/other/bin/trtllm-serve"


def test_files_are_written_for_an_engine() -> None:
    """Text as it is, values as JSON."""
    made = launch(files={"a.txt": "x", "b.json": {"n": 1}})

    assert made.files == {"a.txt": "x", "b.json": '{\n  "n": 1\n}\n'}


@pytest.mark.parametrize("inside", [False, True])
def test_mooncakes_client_is_kept_on_loopback(
    monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """Also where it is one of several connectors; other engines start as they are."""
    monkeypatch.setattr(engines, "listening_environment", lambda host: {"LD_PRELOAD": host})
    connector: dict[str, Any] = {"kv_connector": "MooncakeStoreConnector"}
    if inside:
        connector = {"kv_connector": "MultiConnector", "of": [connector]}

    assert launch(connector=connector).environment["LD_PRELOAD"] == "127.0.0.1"
    assert launch().environment.get("LD_PRELOAD") != "127.0.0.1"
