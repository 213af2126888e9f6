"""TensorRT-LLM behind ``trtllm-serve``; recognized and started, not judged yet.

What is known is from its sources, not from a run: they have no request that empties the cache, and
``/metrics`` is JSON about iterations (tensorrt_llm/serve/openai_server.py, register_routes).
Prometheus's text is at ``/prometheus/metrics`` where ``return_perf_metrics`` is set; of what came
from outside the GPU it counts bytes, not tokens (tensorrt_llm/metrics/collector.py).
"""

from kvkeep.validate.subjects.base import Kind, Signs
from kvkeep.validate.subjects.hooks import Hooks, Reset


def _is_it(signs: Signs) -> bool:
    return signs.program == "trtllm"


KIND = Kind(
    name="trtllm",
    title="TensorRT-LLM, `trtllm-serve`",
    is_it=_is_it,
    beside="nothing: the memory is the engine's",
    counted="no counter of tokens is known: `--external-counters`, where yours has one",
    trial="command line and detection only: it needs a GPU, and no request that resets it is known",
    when_idle="TensorRT-LLM counts no tokens from outside the GPU that are known here.",
    hooks=Hooks(
        reset=Reset(
            address="",
            otherwise="TensorRT-LLM has no request that empties its cache; where yours has one, "
            "name it with --reset",
        )
    ),
    examples=("subjects/trtllm.yaml",),
)
