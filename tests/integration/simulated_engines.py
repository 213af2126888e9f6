"""vLLM's own scheduler and connector calls around a model of arithmetic, in this process.

Everything is real but the forward pass: its KV of a token follows from the token and from all KV
before it *as it lies in memory*, and its answer from all KV. So an answer is right only if every
block that was read had arrived, in its place, on every rank.
"""

import copy
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_TOKENS = 16
HEADS = 2
LAYERS = 3
CONTENT = 64
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "head_dim": CONTENT // 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
STEPS_MAX = 100_000
_MODULUS = 19_997
"""Leaves room for what is added per layer, head and element in 16 bits."""


def write_model(folder: Path, weights: bytes = b"weights") -> Path:
    """A model's folder, as far as a scheduler and a connector look at it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    header = b"{}"
    content = len(header).to_bytes(8, "little") + header + weights
    (folder / "model.safetensors").write_bytes(content)
    return folder


def make_config(
    model: Path,
    socket: str,
    *,
    tp_size: int = 1,
    step_tokens: int = 64,
    dtype: str = "bfloat16",
    extra: dict[str, Any] | None = None,
    **scheduler: Any,
) -> VllmConfig:
    """An engine's configuration."""
    return VllmConfig(
        model_config=ModelConfig(
            model=str(model), skip_tokenizer_init=True, dtype=dtype, max_model_len=2048
        ),
        cache_config=CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=step_tokens,
            max_num_seqs=8,
            max_model_len=2048,
            is_encoder_decoder=False,
            **scheduler,
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=tp_size),
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvkeepConnector",
            kv_connector_module_path="kvkeep.connector.plugin",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            # A daemon that is slow to answer is waited for: a busy machine costs no hits.
            kv_connector_extra_config={"socket": socket, "patience_ms": 10_000, **(extra or {})},
        ),
    )


def make_cache_config(tp_size: int, num_blocks: int) -> KVCacheConfig:
    """The KV cache of one rank."""
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=max(1, HEADS // tp_size),
        head_size=CONTENT // 2,
        dtype=torch.bfloat16,
    )
    names = [f"layers.{idx}" for idx in range(LAYERS)]
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
    )


def answer_to(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What the model answers when nothing is ever cached."""
    tokens, total = list(token_ids), 0
    for position in range(len(tokens) + num_tokens - 1):
        value = _value(total, tokens[position])
        rows = LAYERS * HEADS * CONTENT * value
        rows += HEADS * CONTENT * 7 * sum(range(LAYERS)) + LAYERS * CONTENT * 3 * sum(range(HEADS))
        rows += LAYERS * HEADS * sum(range(CONTENT))
        total += (position + 1) * rows
        if position >= len(token_ids) - 1:
            tokens.append(_sampled(total))
    return tokens[len(token_ids) :]


def _value(total: int, token: int) -> int:
    return (total * 31 + token * 17 + 7) % _MODULUS


def _sampled(total: int) -> int:
    return total % 997


class Rank:
    """One rank: its memory and its half of the connector."""

    def __init__(self, config: VllmConfig, cache_config: KVCacheConfig, rank: int) -> None:
        config = copy.copy(config)
        config.parallel_config = copy.copy(config.parallel_config)
        config.parallel_config.rank = rank
        tp_size = config.parallel_config.tensor_parallel_size
        local = max(1, HEADS // tp_size)
        self.heads = range(rank * local if tp_size <= HEADS else rank // (tp_size // HEADS), HEADS)[
            :local
        ]
        shape = (LAYERS, cache_config.num_blocks, local, BLOCK_TOKENS, CONTENT)
        # What an engine's memory holds before it is written is anything but zeros.
        self.kv = torch.full(shape, 0x2F2F, dtype=torch.int16)
        layers = self.kv.view(torch.bfloat16)
        self.connector: Any = KVConnectorFactory.create_connector(
            config, KVConnectorRole.WORKER, cache_config
        )
        self.connector.register_kv_caches({f"layers.{i}": layers[i] for i in range(LAYERS)})

    def begin(self, output: Any) -> None:
        """What the model runner calls before the forward pass (vllm 0.32)."""
        self.connector.bind_connector_metadata(copy.deepcopy(output.kv_connector_metadata))
        if output.has_sync_kv_loads:
            self.connector.start_load_kv(None)

    def end(self, output: Any) -> KVConnectorOutput:
        """What it calls after the forward pass, or without one (vllm 0.32)."""
        connector = self.connector
        if not output.has_sync_kv_loads:
            connector.start_load_kv(None)
        connector.wait_for_save()
        found = KVConnectorOutput(
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return found


class SimulatedEngine:
    """An engine core without processes."""

    def __init__(self, config: VllmConfig, *, num_blocks: int = 64) -> None:
        tp_size = config.parallel_config.tensor_parallel_size
        config.cache_config.num_gpu_blocks = num_blocks
        cache_config = make_cache_config(tp_size, num_blocks)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.scheduler = Scheduler(
            config,
            cache_config,
            StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
            log_stats=False,
        )
        self.ranks = [Rank(config, cache_config, rank) for rank in range(tp_size)]
        self._aggregator = KVOutputAggregator(tp_size)
        self._pause = threading.Event()
        self.answers: dict[str, list[int]] = {}
        self.num_loaded_tokens = 0
        """Tokens that vLLM counted as loaded by the connector."""

    def close(self) -> None:
        """Stop both halves."""
        self.scheduler.shutdown()
        for rank in self.ranks:
            rank.connector.shutdown()

    def add(
        self,
        req_id: str,
        token_ids: Sequence[int],
        num_tokens: int = 4,
        salt: str | None = None,
    ) -> Request:
        """A request arrives."""
        parameters = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
        request = Request(
            req_id, list(token_ids), parameters, None, cache_salt=salt, block_hasher=self._hasher
        )
        self.answers[req_id] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, req_id: str) -> None:
        """The client of a request went away."""
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)

    def reset_local(self) -> bool:
        """Empty vLLM's own prefix cache."""
        return bool(self.scheduler.reset_prefix_cache())

    def step(self) -> Any:
        """Plan, compute and account for one step; gives what was scheduled."""
        output = self.scheduler.schedule()
        self.num_loaded_tokens += sum(
            BLOCK_TOKENS * len(job.slots) for job in output.kv_connector_metadata.loads
        )
        for rank in self.ranks:
            rank.begin(output)
        sampled = self._compute(output)
        found = [rank.end(output) for rank in self.ranks]
        results = [self._result(output, sampled, one) for one in found]
        merged = self._aggregator.aggregate(results) if len(results) > 1 else results[0]
        assert merged is not None
        if not output.num_scheduled_tokens and found[0].is_empty() and len(found) == 1:
            merged.kv_connector_output = None
        for group in self.scheduler.update_from_output(output, merged).values():
            for one in group.outputs:
                self.answers[one.request_id] += one.new_token_ids
        return output

    @staticmethod
    def _result(output: Any, sampled: dict[str, list[int]], found: Any) -> ModelRunnerOutput:
        req_ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: idx for idx, req_id in enumerate(req_ids)},
            sampled_token_ids=[sampled[req_id] for req_id in req_ids],
            kv_connector_output=found,
        )

    def _compute(self, output: Any) -> dict[str, list[int]]:
        cached = output.scheduled_cached_reqs
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return {
            req_id: self._forward(req_id, starts[req_id], num_tokens)
            for req_id, num_tokens in output.num_scheduled_tokens.items()
        }

    def _forward(self, req_id: str, start: int, num_tokens: int) -> list[int]:
        tokens = self.scheduler.requests[req_id].all_token_ids
        (table,) = self.scheduler.kv_cache_manager.get_block_ids(req_id)
        total = self._total(table, start)
        for position in range(start, start + num_tokens):
            value = _value(total, tokens[position])
            block, offset = table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
            total += (position + 1) * self._write(block, offset, value)
        return [_sampled(total)] if start + num_tokens == len(tokens) else []

    def _write(self, block: int, offset: int, value: int) -> int:
        """Write one token's KV on every rank; gives the sum over all of the model's heads."""
        layers = torch.arange(LAYERS)[:, None, None] * 7
        columns = torch.arange(CONTENT)[None, None, :]
        written: dict[int, int] = {}
        for rank in self.ranks:
            heads = torch.tensor(list(rank.heads))[None, :, None] * 3
            rows = (value + layers + heads + columns).to(torch.int16)
            rank.kv[:, block, :, offset] = rows
            for idx, head in enumerate(rank.heads):
                written[head] = int(rows[:, idx].to(torch.int64).sum())
        return sum(written.values())

    def _total(self, table: Sequence[int], num_tokens: int) -> int:
        """What the attention of a token behind ``num_tokens`` others reads, off every rank."""
        if not num_tokens:
            return 0
        blocks = list(table[: -(-num_tokens // BLOCK_TOKENS)])
        weights = torch.arange(1, num_tokens + 1)
        sums: list[dict[int, int]] = []
        for rank in self.ranks:
            rows = rank.kv[:, blocks].to(torch.int64).sum(dim=(0, 4))
            by_token = rows.permute(0, 2, 1).reshape(-1, rows.shape[1])[:num_tokens]
            by_head = (by_token * weights[:, None]).sum(dim=0).tolist()
            sums.append(dict(zip(rank.heads, by_head, strict=True)))
        # A replica reads its own copy: if any is wrong, the answer is.
        wrong = sum(
            one[head] != two[head] for one in sums for two in sums for head in one.keys() & two
        )
        return sum({head: value for one in sums for head, value in one.items()}.values()) + wrong

    def run(self) -> None:
        """Step until every request has its answer and every block is given back."""
        for _ in range(STEPS_MAX):
            if not self.scheduler.has_requests():
                return
            if not self.step().num_scheduled_tokens:
                self._pause.wait(0.001)  # as the engine core does (vllm 0.32, v1/engine/core.py)
        raise AssertionError(f"not done after {STEPS_MAX} steps: {self.scheduler.requests}")


@contextmanager
def simulated_engine(config: VllmConfig, *, num_blocks: int = 64) -> Iterator[SimulatedEngine]:
    """An engine that is stopped at the end."""
    engine = SimulatedEngine(config, num_blocks=num_blocks)
    try:
        yield engine
    finally:
        engine.close()
