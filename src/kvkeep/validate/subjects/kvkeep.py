"""vLLM with kvkeep's connector, and a kvkeep daemon beside it."""

from kvkeep.validate.subjects.base import Kind, Signs


def _is_it(signs: Signs) -> bool:
    return signs.has("KvkeepConnector")


KIND = Kind(
    name="kvkeep",
    title="vLLM + kvkeep",
    is_it=_is_it,
    beside="a `kvkeep daemon`, which the stack starts",
    counted="vLLM's counters, and the daemon's own beside them",
    trial="judged by tests/e2e/test_check_command.py",
    when_idle="See docs/troubleshooting.md: a small pool, or loads that were turned down.",
    examples=("one-engine.yaml", "prefill-decode.yaml"),
)
