"""The tables of the four reference documents, as data: what they promise to who knows their names.

Defaults are written as the documents write them.
"""

from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable."""

    name: str
    default: str
    """As the document writes it."""
    field: str
    """The setting it changes."""
    raw: str
    """A value to set it to."""
    changed: object
    """What the setting is then."""


DETERMINISM = (
    Variable(
        "KVBM_MODEL_ID",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "model_id",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-0.6B",
    ),
    Variable("KVBM_SERVER_PORT", "8000", "server_port", "8001", 8001),
    Variable("KVBM_SERVER_START_TIMEOUT", "300", "server_start_timeout_s", "12.5", 12.5),
    Variable("KVBM_CPU_BLOCKS", "10000", "cpu_blocks", "12000", 12000),
    Variable("KVBM_MAX_TOKENS", "48", "max_tokens", "48, 128,256", (48, 128, 256)),
    Variable("KVBM_SEED", "42", "seed", "0", 0),
    Variable("KVBM_MAX_ITERATIONS", "500", "max_iterations", "100", 100),
    Variable("KVBM_WORD_COUNT", "200", "word_count", "150", 150),
    Variable("KVBM_CONTROL_INTERVAL", "10", "control_interval", "5", 5),
    Variable("KVBM_SHAKESPEARE_INTERVAL", "1", "shakespeare_interval", "2", 2),
    Variable("KVBM_RANDOM_INTERVAL", "7", "random_interval", "3", 3),
    Variable("KVBM_HTTP_TIMEOUT", "30", "http_timeout_s", "60", 60.0),
    Variable(
        "KVBM_SHAKESPEARE_URL",
        "https://ocw.mit.edu/ans7870/6/6.006/s08/lecturenotes/files/t8.shakespeare.txt",
        "shakespeare_url",
        "file:///tmp/t.txt",
        "file:///tmp/t.txt",
    ),
    Variable("KVBM_CONCURRENT_REQUESTS", "3", "concurrent_requests", "10,25,50", (10, 25, 50)),
    Variable("KVBM_IFEVAL_PROMPTS", "120", "ifeval_prompts", "50,120,200", (50, 120, 200)),
)

MULTI_PROCESS = (
    Variable("BUILD_ID", "local_<timestamp>", "build_id", "b7", "b7"),
    Variable(
        "RESULTS_DIR", "/tmp/lmcache_ci_results_${BUILD_ID}", "results_dir", "/tmp/r", "/tmp/r"
    ),
    Variable("VENV_DIR", "<workspace>/.venv", "venv_dir", "/tmp/v", "/tmp/v"),
    Variable("MODEL", "Qwen/Qwen3-14B", "model_id", "some/model", "some/model"),
    Variable("VLLM_PORT", "8000", "server_port", "8002", 8002),
    Variable("VLLM_BASELINE_PORT", "9000", "baseline_port", "9001", 9001),
    Variable("LMCACHE_PORT", "6555", "cache_port", "6556", 6556),
    Variable("MAX_WAIT_SECONDS", "300", "server_start_timeout_s", "60", 60.0),
    Variable("NUM_CONCURRENT", "50", "num_concurrent", "4", 4),
    Variable("LIMIT", "300", "limit", "20", 20),
    Variable("NUM_PROMPTS", "50", "num_prompts", "7", 7),
    Variable("RANDOM_INPUT_LEN", "10000", "random_input_len", "500", 500),
    Variable("RANDOM_OUTPUT_LEN", "1", "random_output_len", "2", 2),
    Variable("RANDOM_SEED", "<timestamp>", "random_seed", "3", 3),
    Variable("DOCUMENT_LENGTH", "10000", "document_length", "400", 400),
    Variable("NUM_DOCUMENTS", "30", "num_documents", "5", 5),
    Variable("OUTPUT_LEN", "200", "output_len", "9", 9),
    Variable("MAX_LMCACHE_TTFT", "0.22", "max_ttft_s", "1.5", 1.5),
    Variable("MAX_LMCACHE_QUERY_ROUND_TIME", "0.58", "max_query_round_time_s", "2.5", 2.5),
)

HAND_OFF = (
    Variable("VLLM_DOCKER_IMAGE", "vllm/vllm-openai:latest", "docker_image", "a:b", "a:b"),
    Variable("MODEL_NAMES", "meta-llama/Llama-3.2-1B-Instruct", "model_id", "m/n", "m/n"),
    Variable("NUM_PREFILL_INSTANCES", "1", "num_prefill_instances", "2", 2),
    Variable("NUM_DECODE_INSTANCES", "1", "num_decode_instances", "3", 3),
    Variable("PREFILLER_TP_SIZE", "1", "prefill_tp_size", "2", 2),
    Variable("DECODER_TP_SIZE", "1", "decode_tp_size", "4", 4),
    Variable("GPU_MEMORY_UTILIZATION", "0.6", "gpu_memory_utilization", "0.4", 0.4),
    Variable("PREFILL_BLOCK_SIZE", "128", "prefill_block_tokens", "64", 64),
    Variable("DECODE_BLOCK_SIZE", "128", "decode_block_tokens", "32", 32),
    Variable("KV_BUFFER_DEVICE", "cuda", "kv_buffer_device", "cpu", "cpu"),
    Variable("TEST_FLASHINFER", "(unset)", "test_flashinfer", "1", True),
    Variable("PREFILL_BASE_PORT", "", "prefill_base_port", "9100", 9100),
    Variable("DECODE_BASE_PORT", "", "decode_base_port", "9200", 9200),
    Variable("ROUTER_PORT", "", "router_port", "9300", 9300),
)

UNSAID = {"local_<timestamp>", "<workspace>/.venv", "<timestamp>", "(unset)", ""}
"""Defaults that name no value: they are made at the start, or there is none."""

NAMES = {
    "test_determinism.py": "determinism",
    "test_determinism_agg.py": "determinism",
    "test_determinism_disagg.py": "determinism-disaggregated",
    "test_determinism_with_cache_reset": "determinism",
    "test_concurrent_determinism_with_ifeval": "determinism-concurrent",
    "test_routing_distribution.py": "routing",
    "test_cache_locality.py": "locality",
    "test_generation_flow.py": "generation",
    "test_cache_performance.py": "cache-performance",
    "test_stress.py": "stress",
    "run-lm-eval.sh": "lm-eval",
    "run-vllm-bench.sh": "bench",
    "run-long-doc-qa.sh": "long-doc-qa",
    "test_pd_accuracy.py": "pd-accuracy",
    "run_accuracy_test.sh": "pd-accuracy",
    "tp_config_sweep_test.sh": "tp-sweep",
}
"""The documents' files and tests, and the suite that each of them is here."""

RESULT_FILES = (
    "lm_eval/first_run/samples_gsm8k_*.jsonl",
    "lm_eval/second_run/samples_gsm8k_*.jsonl",
    "long_doc_qa/lmcache_result.json",
    "long_doc_qa/baseline_result.json",
    "long_doc_qa/lmcache_output.txt",
    "long_doc_qa/baseline_output.txt",
    "vllm_bench/lmcache.json",
    "vllm_bench/baseline.json",
)
LONG_DOC_QA_FIELDS = (
    "query_ttft_per_prompt",
    "query_round_time_per_prompt",
    "warmup_round_time_per_prompt",
)
BENCH_FIELDS = ("total_input_tokens", "completed", "total_token_throughput")
MARKERS = ("kvbm", "e2e", "slow", "nightly")
