"""Stacks for a check: what file, flags and defaults make of them, and who plays which part."""

from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.process import this_process
from kvkeep.stack.record import DaemonRecord, EngineRecord, StackRecord, write_record
from kvkeep.stack.spec import StackSpec
from kvkeep.validate import started as module
from kvkeep.validate.settings import CheckSettings, Document
from kvkeep.validate.started import (
    by_stack,
    own_spec,
    own_template,
    spec_from_file,
    started,
    template_from_file,
)
from kvkeep.validate.suite.registry import find_all

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


def test_variables_of_other_documents_shape_the_stack(stack_file: Path) -> None:
    """MODEL, VLLM_PORT and LMCACHE_PORT are heard by suites of their document only."""
    environ = {"MODEL": "/models/y", "VLLM_PORT": "8124", "LMCACHE_PORT": "6555"}

    def spec(document: Document) -> StackSpec:
        return spec_from_file(stack_file, {}, exact=None, environ=environ, documents=(document,))

    ours, others = spec(Document.MULTI_PROCESS), spec(Document.DETERMINISM)
    assert (ours.model, ours.engines[0].port) == ("/models/y", 8124)
    assert ours.daemon.metrics_port == 6555
    assert (others.model, others.engines[0].port) == ("smollm2", 0)


def own(*names: str, **settings: Any) -> StackSpec:
    return own_spec(CheckSettings(**settings), {}, exact=False, suites=find_all(names))


def test_its_own_stack_has_what_its_suites_need() -> None:
    """A baseline for what compares, a router for what routes, listeners for sequences."""
    spec = own("long-doc-qa", "routing", "locality", baseline_port=9001, router_port=9300)

    engines = {engine.name: engine for engine in spec.engines}
    assert list(engines) == ["a", "b", "baseline"]
    assert (engines["baseline"].connector, engines["baseline"].port) == ("none", 9001)
    assert spec.router is not None
    assert (spec.router.policy, spec.router.port) == ("consistent_hash", 9300)
    assert spec.daemon.settings == {"sequences": {}}
    assert own("determinism").router is None


def test_its_own_pair_is_what_the_variables_say() -> None:
    """Numbers, ranks, blocks and ports of prefill and decode engines, prefill first."""
    spec = own(
        "pd-accuracy",
        num_prefill_instances=2,
        decode_tp_size=2,
        prefill_block_tokens=64,
        decode_block_tokens=32,
        prefill_base_port=9100,
        test_flashinfer=True,
    )

    assert [(e.name, e.role, e.port) for e in spec.engines] == [
        ("prefill-0", "prefill", 9100),
        ("prefill-1", "prefill", 9101),
        ("decode-0", "decode", 0),
    ]
    assert [e.tensor_parallel for e in spec.engines] == [1, 1, 2]
    assert [e.block_tokens for e in spec.engines] == [64, 64, 32]
    assert {e.connector for e in spec.engines} == {"nixl"}
    assert {e.connector for e in own("pd-accuracy").engines} == {"kvkeep"}
    assert spec.engines[0].env == {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}
    assert spec.router is not None


def test_suites_that_need_a_router_have_stacks_of_their_own() -> None:
    """Others come first; a pair is what any of those that need one gets by itself."""
    names = ["pd-accuracy", "generation", "determinism-disaggregated", "routing", "stress"]

    assert [[suite.name for suite in shared] for shared in by_stack(find_all(names))] == [
        ["generation", "stress"],
        ["routing"],
        ["determinism-disaggregated", "pd-accuracy"],
    ]
    roles = [engine.role for engine in own("determinism-disaggregated").engines]
    assert roles == ["prefill", "decode"]


def test_parts_of_a_stack_are_found() -> None:
    """A decode engine is tested, a prefill engine is beside it, and no baseline is tested."""
    pair = {"router": {}, "engines": [{"name": "p", "role": "prefill"}]}
    pair["engines"] += [{"name": "d", "role": "decode"}]  # type: ignore[operator]
    urls = {name: f"http://{name}" for name in ("p", "d", "a", "b")}

    found = module._addresses(
        make_spec(pair, environment={}), urls, None, ("http://front", "http://admin")
    )
    beside = module._addresses(
        make_spec({"engines": [{"name": "a", "connector": "none"}, {"name": "b"}]}, environment={}),
        urls,
        None,
    )

    assert (found.engine, found.prefill, found.decode) == ("http://d", ("http://p",), ("http://d",))
    assert (found.router, found.router_admin) == ("http://front", "http://admin")
    assert (beside.engine, beside.baseline, beside.other) == ("http://b", "http://a", None)


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


SIZES = {"prefill": {"tensor_parallel": 2, "block_tokens": 64}, "decode": {"block_tokens": 64}}


def test_a_stack_file_is_a_template_of_several_stacks(tmp_path: Path) -> None:
    """Engines of a role get its fields, over the file; what follows from a field follows anew."""
    path = tmp_path / "pair.yaml"
    path.write_text(
        "exact: true\nrouter: {}\nengines: [{name: p, role: prefill, block_tokens: 32}, "
        "{name: q, role: prefill}, {name: d, role: decode, tensor_parallel: 3}]\n"
    )
    template = template_from_file(path, {"model_id": "/models/x"}, exact=None)

    spec = template(SIZES)

    assert [engine.tensor_parallel for engine in spec.engines] == [2, 2, 3]
    assert [engine.max_num_batched_tokens for engine in spec.engines] == [64, 64, 64]
    assert spec.model == "/models/x"
    assert [engine.tensor_parallel for engine in template({}).engines] == [1, 1, 3]
    with pytest.raises(InputError, match="block_tokens"):
        template({"prefill": {"block_tokens": 64}})


def test_a_check_without_a_file_has_a_template_too() -> None:
    """Its settings with the sizes of each; unequal blocks go by vLLM's own connector."""
    template = own_template(
        CheckSettings(decode_tp_size=3), {}, exact=False, suites=find_all(["tp-sweep"])
    )

    same, other = template(SIZES), template({"prefill": {"block_tokens": 64}})

    assert [(e.tensor_parallel, e.block_tokens) for e in same.engines] == [(2, 64), (3, 64)]
    assert [(e.connector, e.block_tokens) for e in other.engines] == [("nixl", 64), ("nixl", 128)]
