"""What running engines tell, and which of them a router is not started for."""

import pytest

from kvkeep.model.errors import InputError
from kvkeep.stack.routing.running import Told, check_told, check_values, find_cache_labels

METRICS = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 0.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="64",cache_dtype="auto",engine="0",num_gpu_blocks="9"} 1.0
"""


def engine(name: str, *models: str, **cache: str) -> Told:
    """What an engine tells."""
    return Told(name, f"http://{name}:1", frozenset(models), cache)


def test_the_labels_are_found_among_the_metrics() -> None:
    """As vLLM writes them."""
    found = find_cache_labels(METRICS)

    assert (found["block_size"], found["cache_dtype"]) == ("64", "auto")


@pytest.mark.parametrize(
    "text",
    ["", "{}", METRICS[:200], 'vllm:cache_config_info{block_size="6', "vllm:cache_config_info{} x"],
)
def test_other_pages_say_nothing(text: str) -> None:
    """Of another server, or cut: then nothing is known, and nothing fails."""
    assert find_cache_labels(text) == {}


def test_engines_with_unlike_blocks_are_refused() -> None:
    """Both are named, with what they run with and the mend."""
    told = [
        engine("p", "m", block_size="32", cache_dtype="auto"),
        engine("q", "m", block_size="32", cache_dtype="auto"),
        engine("d", "m", block_size="64", cache_dtype="auto"),
    ]

    with pytest.raises(InputError) as caught:
        check_told(told, transport="pool")

    assert str(caught.value) == (
        "engine d at http://d:1 runs with --block-size 64 and engine p at http://p:1 with 32: "
        "neither can read blocks that the other computed; start both with the same, or leave one "
        "out."
    )


@pytest.mark.parametrize("transport", ["pool", "nixl"])
def test_unlike_types_are_refused_for_either_transport(transport: str) -> None:
    """One engine's fp8 is the other's nonsense."""
    told = [engine("", "m", cache_dtype="fp8"), engine("", "m", cache_dtype="auto")]

    with pytest.raises(InputError, match="the engine at http://:1 runs with --kv-cache-dtype auto"):
        check_told(told, transport=transport)


@pytest.mark.parametrize(
    ("one", "other", "transport"),
    [
        (engine("p", "m", block_size="32"), engine("d", "m", block_size="32"), "pool"),
        (engine("p", "m", block_size="32"), engine("d", "n", block_size="64"), "pool"),
        (engine("p", "m", block_size="32"), engine("d", block_size="64"), "pool"),
        (engine("p", "m", block_size="32"), engine("d", "m"), "pool"),
        (engine("p", "m", block_size="32"), engine("d", "m", block_size="64"), "nixl"),
    ],
    ids=["alike", "another-model", "no-model", "says-nothing", "nixl"],
)
def test_nothing_is_refused_that_is_not_known_to_fail(
    one: Told, other: Told, transport: str
) -> None:
    """Other models, engines that tell nothing, and blocks that NixlConnector may know to read."""
    check_told([one, other], transport=transport)


def test_engines_without_a_role_are_not_asked() -> None:
    """Each of them serves by itself; a question would open a socket here, which is refused."""
    check_values({"engines": [{"url": "http://127.0.0.1:9"}]})
