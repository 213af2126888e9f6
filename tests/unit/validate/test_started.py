"""Stacks for a check: what file, flags and defaults make of them, and who plays which part."""

from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.process import this_process
from kvkeep.stack.record import DaemonRecord, EngineRecord, StackRecord, write_record
from kvkeep.validate import started as module
from kvkeep.validate.settings import CheckSettings
from kvkeep.validate.started import own_spec, spec_from_file, started

FILE = """
model: smollm2
exact: true
check: {seed: 7}
engines:
  - {name: a}
  - {name: tiny, num_gpu_blocks_override: 20}
  - {name: b}
"""


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(FILE)
    return path


def test_flags_shape_the_stack(stack_file: Path) -> None:
    """Model, port, start time and exactness given as flags win over the file."""
    flags = {"model_id": "/models/x", "server_port": "8123", "server_start_timeout_s": "9"}

    spec = spec_from_file(stack_file, flags, exact=False)

    assert (spec.model, spec.engines[0].port, spec.start_timeout_s) == ("/models/x", 8123, 9.0)
    assert spec.exact is False


def test_without_flags_the_file_decides(stack_file: Path) -> None:
    """What no flag says is as the file says, and its check section is kept for the check."""
    spec = spec_from_file(stack_file, {"model_id": None, "seed": "3"}, exact=None)

    assert spec.exact is True
    assert spec.engines[0].max_num_batched_tokens == spec.engines[0].block_tokens
    assert spec.check == {"seed": 7}


def test_a_check_asks_the_engines_themselves() -> None:
    """No router is started for it, and no engine waits to be asked for."""
    on_demand = {"name": "a", "on_demand": True}
    spec = make_spec({"router": {}, "engines": [on_demand, {"name": "b"}]}, environment={})

    checked = module._without_router(spec)

    assert checked.router is None
    assert [engine.on_demand for engine in checked.engines] == [False, False]
    assert [engine.name for engine in module._big_engines(spec)] == ["b", "a"]


def test_a_missing_stack_file_is_refused(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(InputError, match=r"none\.yaml"):
        spec_from_file(tmp_path / "none.yaml", {}, exact=None)


def test_a_check_told_of_no_stack_makes_its_own() -> None:
    """Its own stack has one engine with kvkeep, the packaged model, and the settings' values."""
    spec = own_spec(CheckSettings(server_port=8001, cpu_blocks=50), {}, exact=True)

    assert (spec.name, spec.model, len(spec.engines)) == ("check", "smollm2", 1)
    assert (spec.engines[0].port, spec.daemon.pool_blocks) == (8001, 50)
    assert spec.engines[0].uses_kvkeep
    assert spec.exact


def test_settled_values_are_not_overruled_by_the_environment() -> None:
    """A flag that won over a variable wins in the stack too; other variables still count."""
    environ = {"KVBM_MODEL_ID": "from/environment", "KVBM_GPU_BLOCKS": "40"}

    spec = own_spec(CheckSettings(model_id="from/flag"), environ, exact=False)

    assert spec.model == "from/flag"
    assert spec.engines[0].num_gpu_blocks_override == 40


def test_a_stack_that_is_up_is_used_as_it_is(tmp_path: Path, stack_file: Path) -> None:
    """A stack left up is checked where it listens, and cannot be restarted from here."""
    spec = make_spec(
        {
            "name": "up",
            "state_dir": str(tmp_path),
            "engines": [
                {"name": "tiny", "num_gpu_blocks_override": 20},
                {"name": "a"},
                {"name": "b"},
            ],
        },
        environment={},
    )
    write_record(
        tmp_path,
        StackRecord(
            name="up",
            state="ready",
            supervisor=this_process(),
            model="smollm2",
            daemon=DaemonRecord(socket="", metrics_url="http://d", pool="", keep_pool=False),
            engines=[EngineRecord(name=n, url=f"http://{n}", pid=1) for n in ("tiny", "a", "b")],
        ),
    )

    with started(spec) as ready:
        addresses = ready.addresses

    assert (addresses.engine, addresses.other, addresses.small) == (
        "http://a",
        "http://b",
        "http://tiny",
    )
    assert addresses.daemon == "http://d"
    assert ready.restart is None
