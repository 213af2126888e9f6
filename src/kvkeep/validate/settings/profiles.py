"""Values that nobody named: sizes by scale, and the reference suites' own defaults."""

from collections.abc import Mapping
from typing import Any

from kvkeep.validate.settings.values import Document

REFERENCE_TEXT_URL = "https://ocw.mit.edu/ans7870/6/6.006/s08/lecturenotes/files/t8.shakespeare.txt"

SCALES: Mapping[str, Mapping[str, Any]] = {
    "small": {},
    "full": {
        "max_iterations": 500,
        "num_concurrent": 50,
        "limit": 300,
        "num_prompts": 50,
        "random_input_len": 10_000,
        "document_length": 10_000,
        "num_documents": 30,
        "output_len": 200,
    },
}
"""``small`` is `CheckSettings` as it stands, for a few cores; ``full`` are the documents' sizes."""

PROFILES = ("local", "reference")

REFERENCE: Mapping[Document, Mapping[str, Any]] = {
    Document.DETERMINISM: {
        "model_id": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "server_port": 8000,
        "cpu_blocks": 10_000,
        "shakespeare_url": REFERENCE_TEXT_URL,
    },
    Document.DISTRIBUTED: {},
    Document.MULTI_PROCESS: {
        "model_id": "Qwen/Qwen3-14B",
        "server_port": 8000,
        "baseline_port": 9000,
        "cache_port": 6555,
        "results_dir": "/tmp/lmcache_ci_results_${BUILD_ID}",
        "max_ttft_s": 0.22,
        "max_query_round_time_s": 0.58,
    },
    Document.HAND_OFF: {
        "docker_image": "vllm/vllm-openai:latest",
        "model_id": "meta-llama/Llama-3.2-1B-Instruct",
        "kv_buffer_device": "cuda",
    },
}
"""What each document takes where nobody says otherwise, beside the full sizes."""


LIMITS_MODEL = "Qwen/Qwen3-14B"
LIMITS = ("max_ttft_s", "max_query_round_time_s")
"""Seconds that the documents give for `LIMITS_MODEL` on their machine: for no other model."""


def unnamed(
    profile: str, scale: str, documents: tuple[Document, ...], model_id: str | None = None
) -> dict[str, Any]:
    """Values of a profile and a scale, by field; the first document that has a value decides it.

    Args:
        profile: One of `PROFILES`.
        scale: A key of `SCALES`.
        documents: Whose defaults the reference profile takes.
        model_id: The model that somebody named, if anybody did.
    """
    chosen: dict[str, Any] = dict(SCALES[scale])
    if profile == "reference":
        for document in reversed(documents):
            chosen |= REFERENCE[document]
        if (model_id or chosen.get("model_id")) != LIMITS_MODEL:
            chosen |= dict.fromkeys(LIMITS)
    return {**chosen, "scale": scale}
