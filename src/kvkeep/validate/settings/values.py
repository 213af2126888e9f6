"""Every value that a suite listens to, with the names that the reference suites gave it.

The reference suites come from four documents with environment names of their own, some of which
mean the same (``KVBM_MODEL_ID``, ``MODEL``, ``MODEL_NAMES``). A value exists once here and knows
all its names; a suite hears those of its own document only.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any


class Document(StrEnum):
    """Which reference document a suite comes from, and whose variables it hears."""

    DETERMINISM = "determinism"
    DISTRIBUTED = "distributed"
    """Has no variables."""
    MULTI_PROCESS = "multi-process"
    HAND_OFF = "hand-off"


DOCUMENTS = tuple(Document)


def _value(
    default: Any,
    text: str,
    names: Mapping[Document, str] | str = "",
    *,
    least: float = 1,
    most: float = 10**9,
    unset: str = "the stack's",
) -> Any:
    """A field with what the command line, the environment and the tables need to know of it."""
    if isinstance(names, str):
        names = {Document.DETERMINISM: names} if names else {}
    return field(
        default=default,
        metadata={"help": text, "env": names, "min": least, "max": most, "unset": unset},
    )


def _shared(determinism: str = "", multi_process: str = "", hand_off: str = "") -> dict[Any, str]:
    names = {
        Document.DETERMINISM: determinism,
        Document.MULTI_PROCESS: multi_process,
        Document.HAND_OFF: hand_off,
    }
    return {document: name for document, name in names.items() if name}


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """One value for everything; ``None`` leaves it to the stack.

    The defaults are those of a small machine; `kvkeep.validate.settings.profiles` has the others.
    """

    scale: str = _value("small", "Sizes of the suites: small or full.")
    model_id: str | None = _value(
        None,
        "Model: smollm2, a folder, or an id.",
        _shared("KVBM_MODEL_ID", "MODEL", "MODEL_NAMES"),
    )
    """Model of an engine that the check starts; a running one is asked what it serves."""
    server_port: int | None = _value(
        None, "Port of the engine.", _shared("KVBM_SERVER_PORT", "VLLM_PORT"), most=65535
    )
    server_start_timeout_s: float = _value(
        300.0,
        "Longest wait for a stack that is started, in seconds.",
        _shared("KVBM_SERVER_START_TIMEOUT", "MAX_WAIT_SECONDS"),
    )
    cpu_blocks: int | None = _value(
        None, "Blocks of the host pool of a stack that is started.", "KVBM_CPU_BLOCKS"
    )
    max_tokens: tuple[int, ...] = _value(
        (48,), "Answer lengths, separated by commas; each is one run.", "KVBM_MAX_TOKENS"
    )
    """Answer lengths, each of them one run."""
    concurrent_max_tokens: tuple[int, ...] = _value(
        (10,), "Answer lengths of the concurrent suite where --max-tokens names none."
    )
    """Follows ``max_tokens`` where somebody named that."""
    seed: int = _value(42, "Seed of prompts and sampling.", "KVBM_SEED", least=0)
    max_iterations: int = _value(20, "Iterations of a phase.", "KVBM_MAX_ITERATIONS")
    word_count: int = _value(200, "Words of a window of the long text.", "KVBM_WORD_COUNT", least=8)
    """Words of a window."""
    control_interval: int = _value(
        10, "Ask the control prompts every n-th iteration.", "KVBM_CONTROL_INTERVAL"
    )
    shakespeare_interval: int = _value(
        1, "Ask the next window every n-th iteration.", "KVBM_SHAKESPEARE_INTERVAL"
    )
    random_interval: int = _value(
        7, "Ask the random prompts every n-th iteration.", "KVBM_RANDOM_INTERVAL"
    )
    http_timeout_s: float = _value(
        30.0, "Longest wait for an answer's next piece, in seconds.", "KVBM_HTTP_TIMEOUT"
    )
    shakespeare_url: str | None = _value(
        None,
        "Address of the long text instead of the shipped plays.",
        "KVBM_SHAKESPEARE_URL",
        unset="the shipped plays",
    )
    """Where the long text comes from; None takes the shipped plays."""
    concurrent_requests: tuple[int, ...] = _value(
        (3,), "Requests in flight, separated by commas.", "KVBM_CONCURRENT_REQUESTS"
    )
    ifeval_prompts: tuple[int, ...] = _value(
        (120,), "Instruction-following prompts, separated by commas.", "KVBM_IFEVAL_PROMPTS"
    )
    ifeval_file: str | None = _value(
        None,
        "File or address of IFEval's prompts, JSON Lines with `prompt`, to ask instead.",
        unset="an installed package's, else made with the seed",
    )
    gsm8k_file: str | None = _value(
        None,
        "File or address of GSM8K, JSON Lines with `question` and `answer`, to grade instead.",
        unset="made with the seed",
    )

    subject: str | None = _value(
        None,
        "What is judged: vllm, kvkeep, lmcache, mooncake, nixl, offloading, trtllm or generic.",
        unset="found out",
    )
    reset: str | None = _value(
        None,
        "Request that empties the engine's own cache, such as 'POST /reset_prefix_cache'.",
        unset="vLLM's",
    )
    external_counters: str | None = _value(
        None,
        "Prometheus counters of prompt tokens from outside the engine, separated by commas.",
        unset="vLLM's",
    )
    external_metrics: str | None = _value(
        None, "Path or address where those counters are read.", unset="the engine's `/metrics`"
    )
    external_counter_tokens: int | None = _value(
        None, "Tokens that each of those counts stands for, where they count blocks.", unset="1"
    )
    block_tokens: int | None = _value(
        None, "Tokens per block of an engine that does not say.", unset="as the engine says"
    )

    build_id: str | None = _value(
        None, "Name of this run.", _shared("", "BUILD_ID"), unset="`local_<timestamp>`"
    )
    results_dir: str | None = _value(
        None,
        "Folder of the result files.",
        _shared("", "RESULTS_DIR"),
        unset="`<temporary files>/kvkeep_check_results_${BUILD_ID}`",
    )
    venv_dir: str | None = _value(
        None,
        "Python environment whose programs are run (vllm, lm_eval).",
        _shared("", "VENV_DIR"),
        unset="the one kvkeep runs in",
    )
    baseline_port: int | None = _value(
        None,
        "Port of the engine without a cache.",
        _shared("", "VLLM_BASELINE_PORT"),
        most=65535,
    )
    cache_port: int | None = _value(
        None,
        "Port of the cache: kvkeep's health and metrics.",
        _shared("", "LMCACHE_PORT"),
        most=65535,
    )
    num_concurrent: int = _value(8, "Tasks of lm-eval in flight.", _shared("", "NUM_CONCURRENT"))
    strict: bool = _value(False, "Demand equal bytes of lm-eval's answers, as the document does.")
    limit: int = _value(60, "Tasks of lm-eval.", _shared("", "LIMIT"))
    num_prompts: int = _value(20, "Prompts of bench.", _shared("", "NUM_PROMPTS"))
    random_input_len: int = _value(
        3000, "Tokens of each prompt of bench.", _shared("", "RANDOM_INPUT_LEN")
    )
    random_output_len: int = _value(
        1, "Tokens of each answer of bench.", _shared("", "RANDOM_OUTPUT_LEN")
    )
    random_seed: int | None = _value(
        None,
        "Seed of the prompts of bench.",
        _shared("", "RANDOM_SEED"),
        least=0,
        unset="the seed of the run",
    )
    document_length: int = _value(
        3000, "Tokens of each document of long-doc-qa.", _shared("", "DOCUMENT_LENGTH")
    )
    num_documents: int = _value(8, "Documents of long-doc-qa.", _shared("", "NUM_DOCUMENTS"))
    output_len: int = _value(50, "Tokens of each answer of long-doc-qa.", _shared("", "OUTPUT_LEN"))
    max_ttft_s: float | None = _value(
        None,
        "Longest mean time to first token of long-doc-qa, in seconds.",
        _shared("", "MAX_LMCACHE_TTFT"),
        least=0,
        unset="none: only relative to computing",
    )
    max_query_round_time_s: float | None = _value(
        None,
        "Longest round of long-doc-qa per prompt, in seconds.",
        _shared("", "MAX_LMCACHE_QUERY_ROUND_TIME"),
        least=0,
        unset="none: only relative to computing",
    )

    docker_image: str | None = _value(
        None,
        "Container image; engines are started as processes, so it is reported only.",
        _shared(hand_off="VLLM_DOCKER_IMAGE"),
        unset="no container",
    )
    num_prefill_instances: int = _value(
        1, "Prefill engines of a pair.", _shared(hand_off="NUM_PREFILL_INSTANCES"), most=64
    )
    num_decode_instances: int = _value(
        1, "Decode engines of a pair.", _shared(hand_off="NUM_DECODE_INSTANCES"), most=64
    )
    prefill_tp_size: int = _value(
        1, "Ranks of each prefill engine.", _shared(hand_off="PREFILLER_TP_SIZE"), most=64
    )
    decode_tp_size: int = _value(
        1, "Ranks of each decode engine.", _shared(hand_off="DECODER_TP_SIZE"), most=64
    )
    gpu_memory_utilization: float = _value(
        0.6,
        "Share of each GPU's memory that an engine of a pair takes.",
        _shared(hand_off="GPU_MEMORY_UTILIZATION"),
        least=0.01,
        most=1,
    )
    prefill_block_tokens: int = _value(
        128, "Tokens per block of prefill engines.", _shared(hand_off="PREFILL_BLOCK_SIZE")
    )
    decode_block_tokens: int = _value(
        128, "Tokens per block of decode engines.", _shared(hand_off="DECODE_BLOCK_SIZE")
    )
    kv_buffer_device: str | None = _value(
        None,
        "Where NIXL keeps what it hands over: cuda or cpu.",
        _shared(hand_off="KV_BUFFER_DEVICE"),
        unset="`cuda` on a GPU, else `cpu`",
    )
    test_flashinfer: bool = _value(
        False, "Also run with FlashInfer's attention.", _shared(hand_off="TEST_FLASHINFER")
    )
    prefill_base_port: int | None = _value(
        None,
        "Port of the first prefill engine.",
        _shared(hand_off="PREFILL_BASE_PORT"),
        most=65535,
        unset="a free one",
    )
    decode_base_port: int | None = _value(
        None,
        "Port of the first decode engine.",
        _shared(hand_off="DECODE_BASE_PORT"),
        most=65535,
        unset="a free one",
    )
    router_port: int | None = _value(
        None,
        "Port of the router of a pair.",
        _shared(hand_off="ROUTER_PORT"),
        most=65535,
        unset="a free one",
    )

    sweep_prefill_tp: tuple[int, ...] = _value(
        (), "Ranks of prefill engines to sweep, separated by commas.", most=64
    )
    """Empty: one, two, and what ``prefill_tp_size`` says."""
    sweep_decode_tp: tuple[int, ...] = _value(
        (), "Ranks of decode engines to sweep, separated by commas.", most=64
    )
    sweep_prefill_blocks: tuple[int, ...] = _value(
        (), "Tokens per block of prefill engines to sweep, separated by commas."
    )
    """Empty: as the stack says."""
    sweep_decode_blocks: tuple[int, ...] = _value(
        (), "Tokens per block of decode engines to sweep, separated by commas."
    )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def variables_of(document: Document) -> dict[str, str]:
    """Field by environment variable, of one document."""
    return {
        f.metadata["env"][document]: f.name
        for f in fields(CheckSettings)
        if document in f.metadata["env"]
    }


ENVIRONMENT: Mapping[str, str] = {
    variable: name for document in DOCUMENTS for variable, name in variables_of(document).items()
}
"""Field by the name of its environment variable, of all documents."""
