"""vLLM with no connector: its own prefix cache, and nothing outside it."""

from kvkeep.validate.subjects.base import Kind, Signs


def _is_it(signs: Signs) -> bool:
    return signs.program == "vllm" and signs.connectors == ()


KIND = Kind(
    name="vllm",
    title="vLLM alone",
    is_it=_is_it,
    beside="nothing",
    counted="nothing can be: it ends as `not-exercised`",
    trial="judged by tests/e2e/test_check_command.py",
    when_idle=(
        "vLLM without a connector keeps nothing outside the engine, so there is nothing to judge: "
        "give it one."
    ),
    examples=("no-cache.yaml",),
)
