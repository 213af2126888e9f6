"""Real stacks: daemon and vLLM engines with a real model, started once per module.

Starting an engine takes half a minute to two on two cores, so tests share a stack and leave it as
they found it: daemon running, engine's own cache to be reset by whoever needs it empty.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.stack.precedence import load_spec
from kvkeep.stack.supervisor import Stack

EXACT = """\
model: smollm2
exact: true
daemon: {pool_bytes: 1GiB}
engines:
  - &engine
    name: a
    cpus: "0"
    kv_cache_bytes: 512MiB
    max_model_len: 2048
    connector_settings: {patience_ms: 5000}
  - {<<: *engine, name: b, cpus: "1"}
"""

# In bfloat16 the order of additions moves logprobs by 0.1 nat with the batch; in float32 by 0.0001.
SERVING = """\
model: smollm2
daemon: {pool_bytes: 1GiB}
engines:
  - {name: a, kv_cache_bytes: 1GiB, max_model_len: 8192, max_num_seqs: 8, dtype: float32}
"""


def _run(text: str, folder: Path) -> Iterator[Stack]:
    file = folder / "stack.yaml"
    file.write_text(text)
    with Stack(load_spec(file), state_dir=folder / "state") as stack:
        yield stack


@pytest.fixture(scope="module")
def exact_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two engines, a core each, in which a hit must equal a computation to the bit."""
    yield from _run(EXACT, tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def serving_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One engine with ordinary settings."""
    yield from _run(SERVING, tmp_path_factory.mktemp("serving"))
