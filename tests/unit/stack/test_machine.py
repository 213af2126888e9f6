"""Whether a stack fits this machine, on machines made up for the test."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack import machine
from kvkeep.stack.models import Model
from kvkeep.stack.routing.spec import RouterSpec
from kvkeep.stack.spec import DaemonSpec, EngineSpec, StackSpec

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "is_port_free", lambda port: port != 8201)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    room = shutil.disk_usage("/")._replace(free=4 * GIB)
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)


def stack(*engines: dict[str, Any], **daemon: Any) -> StackSpec:
    made = [EngineSpec(**{"name": f"e{idx}"} | engine) for idx, engine in enumerate(engines)]
    fields = {"socket": "/nowhere/k.sock"} | daemon
    return StackSpec(name="s", engines=made or [EngineSpec(name="a")], daemon=DaemonSpec(**fields))


def test_a_stack_that_fits_is_let_through() -> None:
    """Nothing is said about a stack that can run."""
    machine.check_machine(stack({"cpus": [0]}, {"cpus": "0-1"}, pool_bytes=2 * GIB))


def test_a_tier_elsewhere_takes_no_memory_here() -> None:
    """Neither a server that is there already, nor an object store's files."""
    valkey = {"kind": "valkey", "url": "valkey://h", "capacity_bytes": "90GiB"}
    objects = {"kind": "object_store", "start": True, "capacity_bytes": "90GiB"}
    machine.check_machine(stack(pool_bytes=2 * GIB, tiers=[valkey, objects]))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            stack(pool_bytes=9 * GIB),
            "daemon.pool_bytes = 9 GiB: this machine has 8 GiB of memory; choose less.",
        ),
        (
            stack(pool_bytes=5 * GIB),
            "daemon.pool_bytes = 5 GiB: /dev/shm has 4 GiB free; choose less, or enlarge it.",
        ),
        (
            stack({"kv_cache_bytes": GIB}, {"kv_cache_bytes": 7 * GIB}, pool_bytes=2 * GIB),
            "engines[1].kv_cache_bytes = 7 GiB: the pool and the engines' caches together are "
            "10 GiB",
        ),
        (
            stack(tiers=[{"kind": "valkey", "start": True, "capacity_bytes": "900TiB"}]),
            "daemon.tiers[0].capacity_bytes = 921600 GiB: the pool and what tiers keep in memory "
            "together are 921602 GiB, and this machine has 8 GiB; choose less.",
        ),
        (
            stack(
                pool_bytes=GIB,
                tiers=[
                    {"kind": "valkey", "start": True, "capacity_bytes": 4 * GIB},
                    {"kind": "mooncake", "master": "h:1", "segment_bytes": "4GiB"},
                ],
            ),
            "daemon.tiers[1].segment_bytes = 4 GiB: the pool and what tiers keep in memory "
            "together are 9 GiB",
        ),
        (
            stack(
                {"kv_cache_bytes": 2 * GIB},
                tiers=[{"kind": "mooncake", "start": True, "segment_bytes": "5GiB"}],
            ),
            "engines[0].kv_cache_bytes = 2 GiB: the pool, what tiers keep in memory and the "
            "engines' caches together are 9 GiB",
        ),
        (stack({"port": 8201}), "engines[0].port = 8201: another program uses this TCP port"),
        (stack(metrics_port=8201), "daemon.metrics_port = 8201: another program uses this TCP"),
        (stack({"cpus": [0, 7]}), "engines[0].cpus = [0, 7]: there is no core 7 here, only 0,1."),
        (stack({"cpus": "0-3"}), "engines[0].cpus = 0-3: there is no core 2 here, only 0,1."),
        (stack({"cpus": "all"}), "engines[0].cpus = all: write cores such as 0-1"),
        (
            stack({"cpus": "0-1", "tensor_parallel": 2}),
            "engines[0].cpus = 0-1: tensor_parallel is 2; write as many lists",
        ),
        (
            stack({"cpus": [0], "tensor_parallel": 2}),
            "engine e0: 1 cores can't be split over 2 tensor-parallel ranks",
        ),
        (
            stack(enabled=False),
            "daemon.socket = /nowhere/k.sock: no daemon listens there; start one",
        ),
    ],
)
def test_a_stack_that_does_not_fit_is_refused(spec: StackSpec, sentence: str) -> None:
    """What this machine lacks is one sentence with the field and the mend."""
    with pytest.raises(InputError) as caught:
        machine.check_machine(spec)

    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("fields", "cores"),
    [
        ({}, "0,1,2,3"),
        ({"cpus": [1, 2]}, "1,2"),
        ({"cpus": "0-1|2"}, "0-1|2"),
        ({"tensor_parallel": 2}, "0,1|2,3"),
        ({"tensor_parallel": 3}, "0|1|2"),
    ],
)
def test_cores_are_shared_by_the_ranks(fields: dict[str, Any], cores: str) -> None:
    """Each rank gets as many cores as the others; without a word all are used."""
    assert machine.compute_cpus(EngineSpec(name="a", **fields), range(4)) == cores


def test_a_gpu_engine_s_cache_is_not_this_machine_s_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies on a GPU does not count against the host's memory."""
    monkeypatch.setattr(machine, "has_gpu", lambda: True)

    machine.check_machine(stack({"kv_cache_bytes": 60 * GIB}))


def test_too_few_gpus_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that say how many they need are not started on fewer."""
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "find_gpus", lambda: ["0"])

    with pytest.raises(InputError, match="engine e1: it needs 2 GPUs"):
        machine.check_machine(stack({}, {"gpus": 2}))
    assert machine.assigned_gpus(stack({}, {})) == {}
    assert machine.assigned_gpus(stack({"gpus": 1})) == {"e0": ("0",)}


def model_of(folder: Path, **more: object) -> Model:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "dtype": "bfloat16"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | more))
    return Model(location=str(folder), is_local=True)


@pytest.mark.parametrize(
    ("fields", "more", "is_refused"),
    [
        ({}, {"num_hidden_layers": 3}, True),
        ({}, {"num_key_value_heads": 2}, True),
        ({}, {"dtype": "float32"}, True),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, False),
        ({}, {"vocab_size": 9}, False),
        ({"connector": "none"}, {"num_hidden_layers": 3}, False),
    ],
)
def test_models_of_one_daemon_have_one_shape(
    tmp_path: Path, fields: dict[str, Any], more: dict[str, Any], is_refused: bool
) -> None:
    """A fine-tuned one may share the pool; another one is refused by name, before it starts."""
    spec = stack({"dtype": fields.get("dtype")}, {"model": "other", **fields})
    models = {"smollm2": model_of(tmp_path / "a"), "other": model_of(tmp_path / "b", **more)}

    if is_refused:
        with pytest.raises(InputError, match=r"engines\[1\]\.model = other: its blocks are not"):
            machine.check_shapes(spec, models)
    else:
        machine.check_shapes(spec, models)


def test_a_model_of_a_hub_is_not_judged_by_its_shape(tmp_path: Path) -> None:
    """Its configuration is not here yet."""
    models = {
        "smollm2": model_of(tmp_path / "a"),
        "o/m": Model(location="o/m", is_local=False),
    }

    machine.check_shapes(stack({}, {"model": "o/m"}), models)


def test_cores_are_shared_out_behind_a_router() -> None:
    """Its engines work at the same time; without one each has them all."""
    plain = stack({}, {})

    assert machine.assigned_cores(plain) == {}
    routed = msgspec.structs.replace(plain, router=RouterSpec())
    assert machine.assigned_cores(routed) == {"e0": [0], "e1": [1]}


def test_the_router_s_ports_are_looked_at() -> None:
    """One that is taken is refused like an engine's."""
    routed = msgspec.structs.replace(stack({}), router=RouterSpec(port=8201))

    with pytest.raises(
        InputError, match=r"router\.port = 8201: another program uses this TCP port"
    ):
        machine.check_machine(routed)


def test_a_pool_that_is_there_already_needs_no_new_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kept pool's own memory counts as room for it."""
    pool = tmp_path / "pool"
    pool.write_bytes(bytes(1 << 25))
    room = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)

    machine.check_machine(stack(pool_bytes=1 << 25, settings={"pool": str(pool)}))


def test_a_pool_in_blocks_holds_that_many(tmp_path: Path) -> None:
    """A size in blocks is turned into bytes for blocks, their headers, and a rest."""
    shape = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = Model(location=str(tmp_path), is_local=True)

    sized = machine.size_pool(stack(pool_blocks=200), model)

    # Seen in vLLM: 720 KiB a block for this shape.
    blocks_bytes = 200 * 720 * 1024
    assert blocks_bytes < sized.daemon.pool_bytes < blocks_bytes * 1.06


@pytest.mark.parametrize("config", [None, "{}", "["])
def test_a_pool_in_blocks_needs_a_known_model(tmp_path: Path, config: str | None) -> None:
    """Where a block's size is not known, bytes are asked for."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)

    with pytest.raises(InputError, match=r"daemon.pool_blocks = 200: .* set daemon.pool_bytes"):
        machine.size_pool(stack(pool_blocks=200), Model(location=str(tmp_path), is_local=True))


def test_a_pool_in_bytes_stays() -> None:
    """Nothing is changed where nobody counts blocks."""
    spec = stack(pool_bytes=GIB)

    assert machine.size_pool(spec, Model(location="o/m", is_local=False)) == spec


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(2 * GIB, "2 GiB"), (3 * GIB // 2, "1.5 GiB"), (1 << 24, "16 MiB"), (5, "5 bytes")],
)
def test_sizes_are_shown_with_a_unit(num_bytes: int, text: str) -> None:
    """A person reads a size with at most one decimal."""
    assert machine.show_bytes(num_bytes) == text


def test_affinity_is_asked_where_nobody_names_cores() -> None:
    """An engine uses the cores its process may use."""
    assert machine.compute_cpus(EngineSpec(name="a")) == ",".join(
        map(str, sorted(os.sched_getaffinity(0)))
    )
    assert msgspec.structs.asdict(EngineSpec(name="a"))["cpus"] is None
