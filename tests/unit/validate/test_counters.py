"""Counters: read from Prometheus text, compared, and turned into what could have been served."""

import httpx
import pytest

from kvkeep.model.errors import UnavailableError
from kvkeep.validate.counters import (
    EXTERNAL_HITS,
    LOCAL_HITS,
    Counters,
    Servable,
    find_backward,
    parse_cache_config,
    parse_engine,
    read_counters,
    servable_of_one,
    servable_tokens,
    sum_counters,
)
from kvkeep.validate.load import Endpoint
from kvkeep.validate.subjects.hooks import Hooks, Outside

METRICS = """
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 96.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 32.0
# TYPE vllm:prefix_cache_hits_created gauge
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.795e+09
# TYPE vllm:external_prefix_cache_hits_total counter
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 64.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",num_gpu_blocks="20"} 1.0
"""


def test_counters_are_summed_over_engines() -> None:
    """Ranks and engines behind one address count together; times of creation do not count."""
    assert parse_engine(METRICS) == {LOCAL_HITS: 128.0, EXTERNAL_HITS: 64.0}


def test_the_block_size_is_read_from_metrics() -> None:
    """The engine's block size and number of blocks stand in a label of its metrics."""
    assert parse_cache_config(METRICS)["block_size"] == "32"
    assert parse_cache_config(METRICS)["num_gpu_blocks"] == "20"
    assert parse_cache_config("") == {}


def test_text_of_another_format_is_refused() -> None:
    """A page that is not Prometheus text is not read as zero."""
    with pytest.raises(UnavailableError, match="format"):
        parse_engine('vllm:prefix_cache_hits_total{engine="0" 96.0 x\n')


def test_differences_count_new_counters_from_zero() -> None:
    """A counter that appears between two readings started at zero."""
    before, after = Counters({"a": 1.0}, {"x": 5}), Counters({"a": 4.0, "b": 2.0}, {"x": 5})

    assert after.since(before) == Counters({"a": 3.0, "b": 2.0}, {"x": 0})


def test_a_counter_that_falls_or_vanishes_is_named() -> None:
    """Counters never fall; one that vanishes fell to nothing."""
    readings = [
        Counters({"a": 1.0, "b": 1.0}, {"x": 5}),
        Counters({"a": 2.0}, {"x": 7}),
        Counters({"a": 2.0}, {"x": 6}),
    ]

    assert find_backward(readings) == ["b", "x"]
    assert find_backward(readings[:1]) == []


def test_only_whole_blocks_before_the_last_token_can_be_served() -> None:
    """The last token is always computed, so a prompt of whole blocks loses its last one."""
    assert [servable_of_one(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 4, 4, 8]
    assert servable_tokens([[1, 2, 3, 4]], 4) == Servable(0, 0)
    assert servable_tokens([[1, 2, 3, 4, 5]], 4) == Servable(4, 0)


def test_repeats_and_shared_beginnings_are_the_engines_own() -> None:
    """What an earlier prompt of the phase brought, the engine serves itself."""
    shared = [1, 2, 3, 4]
    prompts = [[*shared, 5, 6, 7, 8, 9], [*shared, 9, 9, 9, 9, 9], [*shared, 5, 6, 7, 8, 9]]

    assert servable_tokens(prompts, 4) == Servable(external_tokens=12, local_tokens=12)


def test_equal_blocks_behind_different_ones_are_different() -> None:
    """A block is its whole prefix: equal tokens in another place are not served."""
    assert servable_tokens([[1, 1, 7, 7, 0], [2, 2, 7, 7, 0]], 2) == Servable(8, 0)


def test_counters_of_any_name_are_summed() -> None:
    """Over names and labels, with ``_total`` or without; what was never counted is 0."""
    names = ("vllm:prefix_cache_hits", "vllm:external_prefix_cache_hits_total", "never")

    assert sum_counters(METRICS, names) == 192.0
    with pytest.raises(UnavailableError, match="format"):
        sum_counters("a{ 1 x\n", names)


@pytest.mark.parametrize("address", ["/metrics", "http://cache:9090/metrics"])
async def test_what_another_program_counts_is_read_there(address: str) -> None:
    """Its blocks become tokens under vLLM's name, so that every suite can use them."""
    theirs = '# TYPE matched counter\nmatched_total{rank="0"} 5.0\n'

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=METRICS + theirs if request.url.host == counting else "")

    counting = httpx.URL("http://engine:1").join(address).host
    async with Endpoint("http://engine:1", transport=httpx.MockTransport(answer)) as engine:
        engine.hooks = Hooks(outside=Outside(("matched",), address, 16))
        assert (await read_counters(engine)).external_hit_tokens == 80


async def test_a_counting_program_that_is_silent_is_no_zero() -> None:
    """Nothing is known then, so nothing may be said."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.host == "engine" else 503, text=METRICS)

    async with Endpoint("http://engine:1", transport=httpx.MockTransport(answer)) as engine:
        engine.hooks = Hooks(outside=Outside(("matched",), "http://cache/metrics"))
        with pytest.raises(UnavailableError, match="GET http://cache/metrics failed"):
            await read_counters(engine)
