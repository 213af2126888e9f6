"""Finds out what a server can say and do before it is judged, with a handful of requests."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.validate.counters import (
    EXTERNAL_HITS,
    LOCAL_HITS,
    parse_cache_config,
    read_engine,
)
from kvkeep.validate.load import Dialect, Endpoint, Sampling

PROBE_TEXT = "Say hello."
PROBE = Sampling(max_tokens=1)
PROBE_PATIENCE = 4.0
"""An engine may do at its first request what it left undone at its start, on a busy machine."""
DIALECTS = (
    Dialect(),
    Dialect(token_ids=False),
    Dialect(token_ids=False, cache_salt=False),
    Dialect(logprobs=False, token_ids=False, cache_salt=False),
    Dialect(logprobs=False, token_ids=False, cache_salt=False, usage_in_stream=False),
)
"""Richest first; the first one a server accepts is used."""
BATCHED_TOKENS = re.compile(r"max_num_batched_tokens\D{1,4}(\d+)")
BATCHED_SEQUENCES = re.compile(r"max_num_seqs\D{1,4}(\d+)")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server can say and do."""

    model: str
    max_model_len: int | None
    """Longest prompt plus answer in tokens; None if the server does not say."""
    dialect: Dialect
    block_tokens: int | None
    """Tokens per block, from the engine's metrics."""
    num_blocks: int | None
    """Blocks of the engine's own cache."""
    has_local_counters: bool
    has_external_counters: bool
    reports_cached_tokens: bool
    reports_prompt_ids: bool
    max_num_batched_tokens: int | None
    max_num_seqs: int | None

    @property
    def can_be_exact(self) -> bool | None:
        """Whether chunks end where hits can end, so that reuse changes no bit; None if unknown.

        Source: vLLM's CPU build gave equal bits exactly with ``max_num_batched_tokens`` equal to
        the block size and ``max_num_seqs`` 1.
        """
        if None in (self.max_num_batched_tokens, self.max_num_seqs, self.block_tokens):
            return None
        return self.max_num_batched_tokens == self.block_tokens and self.max_num_seqs == 1

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "can_be_exact": self.can_be_exact}


async def probe(endpoint: Endpoint, *, read_settings: bool = False) -> Capabilities:
    """Ask a server what it is, and set the endpoint's model and dialect accordingly.

    Args:
        endpoint: The server; its ``model`` and ``dialect`` are overwritten with what was found.
        read_settings: Also ask for its scheduler's settings, which only the exact mode needs: vLLM
            takes seconds over that, because it describes the whole machine too.

    Raises:
        InputError: Nothing answers there, it serves no model, or not the one asked for, or every
            form of request was refused.
    """
    endpoint.model, max_model_len = await _find_model(endpoint)
    endpoint.patience = PROBE_PATIENCE
    dialect, answer_ids, cached = await _find_dialect(endpoint)
    endpoint.patience = 1.0
    endpoint.dialect = dialect
    metrics = await _text_or_empty(endpoint, "/metrics")
    counters = await _counters(endpoint)
    cache_config = parse_cache_config(metrics)
    path = "/server_info?config_format=json"
    info = await _text_or_empty(endpoint, path) if read_settings else ""
    return Capabilities(
        model=endpoint.model,
        max_model_len=max_model_len,
        dialect=dialect,
        block_tokens=_number(cache_config.get("block_size")),
        num_blocks=_number(cache_config.get("num_gpu_blocks")),
        has_local_counters=LOCAL_HITS in counters,
        has_external_counters=EXTERNAL_HITS in counters,
        reports_cached_tokens=cached,
        reports_prompt_ids=answer_ids,
        max_num_batched_tokens=_search(BATCHED_TOKENS, info),
        max_num_seqs=_search(BATCHED_SEQUENCES, info),
    )


async def _counters(endpoint: Endpoint) -> dict[str, float]:
    try:
        return await read_engine(endpoint)
    except UnavailableError as error:
        raise InputError(
            f"The counters that were named can't be read: look at --external-metrics. ({error})"
        ) from error


async def _find_model(endpoint: Endpoint) -> tuple[str, int | None]:
    try:
        listed = await endpoint.get_json("/v1/models")
    except UnavailableError as error:
        raise InputError(
            f"No server answers at {endpoint.url}: start one or give another address. ({error})"
        ) from error
    models: list[Mapping[str, Any]] = list((listed or {}).get("data") or [])
    if not models:
        raise InputError(f"{endpoint.url} serves no model.")
    names = [str(model.get("id")) for model in models]
    if endpoint.model is not None and endpoint.model not in names:
        raise InputError(
            f"{endpoint.url} does not serve {endpoint.model!r}; it serves {', '.join(names)}."
        )
    chosen = models[names.index(endpoint.model)] if endpoint.model else models[0]
    return str(chosen.get("id")), _number(chosen.get("max_model_len"))


async def _find_dialect(endpoint: Endpoint) -> tuple[Dialect, bool, bool]:
    """Return the richest dialect that works, and whether prompt ids and cached tokens come."""
    refusal = ""
    for dialect in DIALECTS:
        endpoint.dialect = dialect
        answer = await endpoint.chat(PROBE_TEXT, PROBE, salt="kvkeep-probe")
        if answer.error is None:
            spoken = replace(
                dialect,
                logprobs=dialect.logprobs and bool(answer.steps),
                token_ids=dialect.token_ids
                and bool(answer.steps)
                and answer.steps[0].token.startswith("token_id:"),
            )
            return spoken, answer.prompt_token_ids is not None, answer.cached_tokens is not None
        refusal = answer.error
        if not refusal.startswith("HTTP 4"):
            break
    raise InputError(f"{endpoint.url} answers no chat completion: {refusal}")


async def _text_or_empty(endpoint: Endpoint, path: str) -> str:
    try:
        return await endpoint.get_text(path)
    except UnavailableError:
        return ""


def _number(value: object) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() else None


def _search(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return int(found.group(1)) if found else None
