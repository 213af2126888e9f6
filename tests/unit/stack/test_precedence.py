"""Flag, environment, stack file, default: who wins, and what is refused with which sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import load_spec, make_spec
from kvkeep.stack.spec import StackSpec

ONE: dict[str, Any] = {"name": "s", "engines": [{"name": "a"}]}


def spec_of(
    values: Mapping[str, Any], *overrides: str, environment: Mapping[str, str] | None = None
) -> StackSpec:
    return make_spec(dict(values), overrides, environment=environment or {})


def engines(*several: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "s", "engines": [dict(engine) for engine in several]}


def test_a_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    """A stack file needs engines only; it gives the stack its name."""
    file = tmp_path / "my stack.yaml"
    file.write_text("engines: [{name: a}]\ndaemon: {pool_bytes: 64MiB}\n")

    spec = load_spec(file, environment={})

    assert (spec.name, spec.model, spec.model_name) == ("my-stack", "smollm2", "smollm2")
    assert spec.daemon.pool_bytes == 64 << 20
    assert (spec.engines[0].block_tokens, spec.engines[0].connector) == (32, "kvkeep")


@pytest.mark.parametrize(
    ("overrides", "environment", "port"),
    [
        ((), {}, 1001),
        ((), {"KVBM_SERVER_PORT": "1002"}, 1002),
        (("engines.0.port=1003",), {"KVBM_SERVER_PORT": "1002"}, 1003),
        (("engines.a.port=1004",), {}, 1004),
        (("engines.*.port=1005",), {}, 1005),
        ((), {"KVBM_SERVER_PORT": " "}, 1001),
    ],
)
def test_a_flag_beats_the_environment_beats_the_file(
    overrides: tuple[str, ...], environment: dict[str, str], port: int
) -> None:
    """The first of flag, environment and file that names a value decides it."""
    spec = spec_of(engines({"name": "a", "port": 1001}), *overrides, environment=environment)

    assert spec.engines[0].port == port


def test_the_environment_names_every_field_it_can() -> None:
    """The reference suite's variables and the daemon's own reach their fields."""
    spec = spec_of(
        ONE,
        environment={
            "KVBM_MODEL_ID": "some/model",
            "KVBM_SERVER_START_TIMEOUT": "12.5",
            "KVBM_CPU_BLOCKS": "200",
            "KVBM_GPU_BLOCKS": "20",
            "KVKEEP_METRICS_PORT": "9400",
            "KVKEEP_LEASE_S_MAX": "7",
        },
    )

    assert (spec.model, spec.start_timeout_s) == ("some/model", 12.5)
    assert (spec.daemon.pool_blocks, spec.daemon.metrics_port) == (200, 9400)
    assert spec.engines[0].num_gpu_blocks_override == 20
    assert spec.daemon_settings().lease_s_max == 7


def test_a_later_size_in_bytes_replaces_one_in_blocks() -> None:
    """A flag in bytes beats an environment that says blocks."""
    spec = spec_of(ONE, "daemon.pool_bytes=1GiB", environment={"KVBM_CPU_BLOCKS": "200"})

    assert (spec.daemon.pool_blocks, spec.daemon.pool_bytes) == (None, 1 << 30)


def test_a_running_engine_ignores_what_only_a_start_needs() -> None:
    """An environment that names a port is about engines that are started."""
    spec = spec_of(
        engines({"name": "a", "url": "http://127.0.0.1:8000"}),
        environment={"KVBM_SERVER_PORT": "9"},
    )

    assert spec.engines[0].port == 0


def test_exact_gives_every_engine_its_limits() -> None:
    """Exact mode computes one block of one sequence a step."""
    spec = spec_of(engines({"name": "a", "block_tokens": 64}) | {"exact": True})

    engine = spec.engines[0]
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == (64, 1)


def test_values_are_not_changed() -> None:
    """Settling a stack leaves the values it was given as they were."""
    values = {"name": "s", "engines": [{"name": "a"}]}

    spec_of(values, "engines.a.port=1004", "daemon.pool_bytes=1GiB")

    assert values == {"name": "s", "engines": [{"name": "a"}]}


@pytest.mark.parametrize(
    ("values", "overrides", "sentence"),
    [
        ({"name": "s"}, (), "engines: it is missing; write it."),
        (
            ONE | {"modle": "x"},
            (),
            "modle: there is no such field; did you mean model?",
        ),
        (
            engines({"name": "a", "block_size": 32}),
            (),
            "engines[0].block_size: there is no such field; did you mean block_tokens?",
        ),
        (
            ONE | {"daemon": {"pool_byte": "1GiB"}},
            (),
            "daemon.pool_byte: there is no such field; did you mean pool_bytes?",
        ),
        (
            engines({"name": "a", "block_tokens": 20}),
            (),
            "engines[0].block_tokens = 20: use a multiple of 32.",
        ),
        (
            engines({"name": "a", "port": 99999}),
            (),
            "engines[0].port = 99999: write a whole number of at most 65535.",
        ),
        (
            ONE | {"daemon": {"pool_bytes": "a lot"}},
            (),
            "daemon.pool_bytes: 'a lot' is not a size",
        ),
        (engines({"name": "a", "zzz": 1}), (), "engines[0].zzz: there is no such field; it may be"),
        (
            ONE | {"daemon": {"pool_bytes": 5}},
            (),
            "daemon.pool_bytes = 5: write a whole number of at least ",
        ),
        (
            engines({"name": "a"}, {"name": "a"}),
            (),
            "engines[1].name = a: engines[0] has this name too; give each engine its own.",
        ),
        (
            engines({"name": "a", "port": 8201}, {"name": "b", "port": 8201}),
            (),
            "engines[1].port = 8201: engines[0].port is the same; choose another",
        ),
        (
            engines({"name": "a", "port": 8201}) | {"daemon": {"metrics_port": 8201}},
            (),
            "engines[0].port = 8201: daemon.metrics_port is the same",
        ),
        (
            engines({"name": "-a b"}),
            (),
            "engines[0].name = -a b: write letters, digits, dots, dashes",
        ),
        (
            ONE | {"daemon": {"enabled": False}},
            (),
            "engines[0].connector = kvkeep: there is no tier to keep blocks in",
        ),
        (
            engines({"name": "a", "max_num_seqs": 4}) | {"exact": True},
            (),
            "engines[0].max_num_seqs = 4: exact mode needs 1; leave it out",
        ),
        (
            engines({"name": "a", "args": ["--port=1"]}),
            (),
            "engines[0].args has --port: the field for it is port.",
        ),
        (
            engines({"name": "a", "connector_settings": {"stroe": False}}),
            (),
            "engines[0].connector_settings: kv_connector_extra_config is wrong",
        ),
        (
            engines({"name": "a", "connector_settings": {"socket": "x"}}),
            (),
            "engines[0].connector_settings.socket: write it as daemon.socket instead.",
        ),
        (
            engines({"name": "a", "connector": "none", "connector_settings": {"tenant": "x"}}),
            (),
            "engines[0].connector_settings: only connector: kvkeep has settings; leave them out.",
        ),
        (
            engines({"name": "a", "server": "trtllm"}),
            (),
            "engines[0].connector = kvkeep: kvkeep has no connector for TensorRT-LLM",
        ),
        (
            engines({"name": "a", "url": "localhost"}),
            (),
            "engines[0].url = localhost: write an address such as http://127.0.0.1:8000.",
        ),
        (
            engines({"name": "a", "url": "http://127.0.0.1:1", "port": 1}),
            (),
            "engines[0].port: leave it out, url already holds the port.",
        ),
        (
            ONE | {"daemon": {"settings": {"leases": 1}}},
            (),
            "daemon.settings: 'leases' is not a setting of the daemon",
        ),
        (
            ONE | {"daemon": {"settings": {"pool_bytes": 1}}},
            (),
            "daemon.settings.pool_bytes: write it as daemon.pool_bytes instead.",
        ),
        (ONE, ("model",), "'model' sets nothing: write field=value, such as model=smollm2."),
        (ONE, ("model=[",), "'model=[': the value is not YAML."),
        (ONE, ("engines.z.port=1",), "engines.z.port: there is no engine z in the stack file."),
        (ONE, ("engines.a=1",), "engines.a: name a field of the engine too"),
        (ONE, ("model.x.y=1",), "model.x.y: model has no fields."),
        (engines(), (), "engines: write a list of length 1 or more."),
        ({"name": "s", "engines": 3}, (), "engines = 3: write a list."),
    ],
)
def test_a_wrong_value_is_one_sentence(
    values: dict[str, Any], overrides: tuple[str, ...], sentence: str
) -> None:
    """A mistake names its field, its value and what to do about it."""
    # `model.x.y` needs a model in the file to collide with.
    values = {"model": "smollm2"} | values

    with pytest.raises(InputError) as caught:
        spec_of(values, *overrides)

    text = str(caught.value)
    assert text.startswith(sentence)
    assert "\n" not in text


def test_a_list_in_the_environment_is_refused() -> None:
    """The checks take lists there; one stack can take one value only."""
    with pytest.raises(InputError, match=r"KVBM_CPU_BLOCKS = 200,300: a stack takes one value"):
        spec_of(ONE, environment={"KVBM_CPU_BLOCKS": "200,300"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "can't be read: No such file or directory; name a stack file."),
        ("{", "is not YAML"),
        ("- a", "is not a mapping: write fields such as `model: smollm2`."),
        ("#" * (1 << 20) + "##", "is larger than"),
        ("a: " + "[" * 5000 + "]" * 5000, "is nested too deep"),
        ("a: &a [*a]", "is nested too deep"),
        ("yes: 1", "True is not the name of a field; YAML reads yes, no, on, off"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    """A file that is no stack file is named, with what is wrong about it."""
    file = tmp_path / "stack.yaml"
    if text is not None:
        file.write_text(text)

    with pytest.raises(InputError) as caught:
        load_spec(file, environment={})

    assert str(caught.value).startswith(str(file))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[3] / "examples").glob("*.yaml")))
def test_every_example_is_a_stack_file(file: Path) -> None:
    """What the project shows can be started."""
    assert load_spec(file, environment={}).name == file.stem


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({True: 1}, "default: True is not the name of a field; YAML reads yes"),
        ({1: 2}, "default: 1 is not the name of a field; YAML reads yes"),
        (ONE | {"daemon": {1: 2}}, "daemon: a field's name must be text; YAML reads yes"),
    ],
)
def test_a_key_that_is_no_text_is_one_sentence(values: dict[Any, Any], sentence: str) -> None:
    """YAML reads `yes` and `on` as values, also where a field's name stands."""
    with pytest.raises(InputError, match=sentence):
        spec_of(values)
