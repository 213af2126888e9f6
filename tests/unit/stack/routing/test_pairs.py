"""Which engines of a stack can hand prompts over to each other, and how the others are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.machine import check_shapes
from kvkeep.stack.models import Model
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.routing.pairs import check_heads, check_pairs
from kvkeep.stack.spec import StackSpec

WRONG_ON_POOL: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"block_tokens": 64}, {}, "engines[1].block_tokens = 32: engines[0] has 64"),
    ({}, {"dtype": "float32"}, "engines[1].dtype = float32: engines[0] has None"),
    (
        {},
        {"connector_settings": {"kv_form": "int8"}},
        "engines[1].connector_settings.kv_form = int8: engines[0] has exact",
    ),
    (
        {"connector_settings": {"tenant": "blue"}},
        {},
        "engines[1].connector_settings.tenant = nothing: engines[0] has blue",
    ),
    (
        {},
        {"connector_settings": {"tenant_key_file": "k"}},
        "engines[1].connector_settings.tenant_key_file = k: engines[0] has nothing",
    ),
    (
        {"connector_settings": {"model_identity": "v1"}},
        {"connector_settings": {"model_identity": "v2"}},
        "engines[1].connector_settings.model_identity = v2: engines[0] has v1",
    ),
    ({}, {"model": "o/m"}, "engines[1].model = o/m: engines[0] has smollm2"),
    (
        {},
        {"args": ["--kv-cache-dtype=fp8"]},
        "engines[1].args, --kv-cache-dtype = fp8: engines[0] has nothing",
    ),
    (
        {"args": ["--hf_overrides", "{}"]},
        {},
        "engines[1].args, --hf-overrides = nothing: engines[0] has {}",
    ),
    (
        {"connector_settings": {"store": False}},
        {},
        "engines[0].connector_settings.store = false: an engine with role prefill",
    ),
    (
        {},
        {"connector_settings": {"load": False}},
        "engines[1].connector_settings.load = false: an engine with role decode",
    ),
]
WRONG_ON_NIXL: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"dtype": "float32"}, "engines[1].dtype = float32: engines[0] has nothing"),
    ({}, {"model": "o/m"}, "engines[1].model = o/m: engines[0] has smollm2"),
    (
        {"tensor_parallel": 2},
        {"tensor_parallel": 3},
        "engines[1].tensor_parallel = 3: engines[0] has 2, and NixlConnector splits heads only",
    ),
    ({"block_tokens": 64}, {}, "engines[1].block_tokens = 32: engines[0] has 64"),
    ({}, {"block_tokens": 96}, "engines[1].block_tokens = 96: engines[0] has 32"),
]


def stack(prefill: dict[str, Any], decode: dict[str, Any], **both: Any) -> StackSpec:
    """A prefill engine and a decode engine of one served model behind a router."""
    served = {"served_model_name": "m", **both}
    engines = [
        {"name": "p", "role": "prefill", **served, **prefill},
        {"name": "d", "role": "decode", **served, **decode},
    ]
    return make_spec({"name": "x", "router": {}, "engines": engines}, environment={})


def refusal(prefill: dict[str, Any], decode: dict[str, Any], *, gpu: bool, **both: Any) -> str:
    """How the pair is refused, wherever that is found."""
    with pytest.raises(InputError) as caught:
        check_pairs(stack(prefill, decode, **both), gpu=gpu)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prefill", "decode", "said"), WRONG_ON_POOL, ids=[each[2][:48] for each in WRONG_ON_POOL]
)
def test_blocks_of_another_kind_are_refused_on_the_pool(
    prefill: dict[str, Any], decode: dict[str, Any], said: str
) -> None:
    """Whatever would give blocks another name or another form, by its field and with the mend."""
    assert refusal(prefill, decode, gpu=False).startswith(said)


@pytest.mark.parametrize(
    ("prefill", "decode", "said"), WRONG_ON_NIXL, ids=[each[2][:48] for each in WRONG_ON_NIXL]
)
@pytest.mark.parametrize("gpu", [False, True])
def test_blocks_that_nixl_cannot_read_are_refused(
    prefill: dict[str, Any], decode: dict[str, Any], said: str, gpu: bool
) -> None:
    """What NixlConnector would say at the first request is said before the start."""
    if decode == {"block_tokens": 96}:
        prefill = {"tensor_parallel": 2}  # on GPUs too it splits blocks only as it splits heads

    assert refusal(prefill, decode, gpu=gpu, connector="nixl").startswith(said)


def test_nixl_reads_smaller_blocks_on_gpus_only() -> None:
    """On a CPU it would take them for what a GPU keeps, and answer from nonsense."""
    spec = stack({}, {"block_tokens": 64}, connector="nixl")
    check_pairs(spec, gpu=True)

    with pytest.raises(InputError, match=r"engines\[1\]\.block_tokens = 64: engines\[0\] has 32"):
        check_pairs(spec, gpu=False)


@pytest.mark.parametrize("connector", ["kvkeep", "nixl"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 2), (2, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("block_tokens", [32, 64, 128, 256])
def test_sizes_may_differ(connector: str, sizes: tuple[int, int], block_tokens: int) -> None:
    """Any pair of tensor-parallel sizes passes, at any size of block that both have."""
    prefill, decode = ({"tensor_parallel": size} for size in sizes)
    spec = stack(prefill, decode, connector=connector, block_tokens=block_tokens)

    for gpu in (False, True):
        check_pairs(spec, gpu=gpu)


def test_who_vouches_for_a_model_is_believed() -> None:
    """Two folders with one identity are one model."""
    same = {"connector_settings": {"model_identity": "v1"}}

    check_pairs(stack(same | {"model": "o/m"}, same | {"model": "o/n"}), gpu=False)


def test_pairs_of_two_models_are_no_pair() -> None:
    """What differs between models that a router never hands over between is no fault."""
    engines = [
        {"name": f"{name}-{role}", "role": role, "model": f"o/{name}", "args": args}
        for name, args in (("a", []), ("b", ["--quantization", "fp8"]))
        for role in ("prefill", "decode")
    ]

    check_pairs(make_spec({"router": {}, "engines": engines}, environment={}), gpu=True)


def test_an_engine_that_runs_already_is_not_judged_by_its_fields() -> None:
    """They are not used: it tells itself how it runs."""
    check_pairs(stack({"url": "http://h:1"}, {"args": ["--quantization", "fp8"]}), gpu=True)


def model_of(folder: Path, **config: object) -> dict[str, Model]:
    """The models of a stack whose one model has this configuration."""
    (folder / "config.json").write_text(json.dumps(config))
    return {"smollm2": Model(location=str(folder), is_local=True)}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "choice"),
    [
        (9, 3, 2, "1, 3, 9"),
        (8, 3, 2, "1"),
        (8, 8, 3, "1, 2, 4, 8"),
        (8, 4, 16, "1, 2, 4, 8"),
    ],
)
def test_heads_that_cannot_be_split_are_refused(
    tmp_path: Path, heads: int, kv_heads: int, size: int, choice: str
) -> None:
    """Before half a minute is spent on a start, with the sizes that would do."""
    models = model_of(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads)
    spec = make_spec({"engines": [{"name": "a", "tensor_parallel": size}]}, environment={})

    with pytest.raises(InputError) as caught:
        check_shapes(spec, models)

    assert str(caught.value) == (
        f"engines[0].tensor_parallel = {size}: smollm2 has {heads} attention heads and {kv_heads} "
        f"KV heads, which can't be split over {size} ranks; choose one of {choice}."
    )


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 9, "num_key_value_heads": 3},
        {"num_attention_heads": 12, "num_key_value_heads": 1},
        {"num_attention_heads": 6},
        {"num_attention_heads": "many"},
        {"num_attention_heads": 0},
        {},
    ],
)
def test_other_heads_are_let_through(tmp_path: Path, config: dict[str, object]) -> None:
    """Those that divide, those that are replicated, and those that nobody here can count."""
    spec = make_spec({"engines": [{"name": "a", "tensor_parallel": 3}]}, environment={})

    check_heads(spec, model_of(tmp_path, **config))
