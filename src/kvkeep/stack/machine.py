"""What this machine has: memory, cores, free ports; and whether a stack fits.

Everything here only asks. It is checked before anything is started, so that a stack that can't
run leaves nothing behind.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.stack.models import Model
from kvkeep.stack.placement.assign import assign_gpus, find_gpus, fits_without_a_word, share_cores
from kvkeep.stack.routing.pairs import check_heads, check_pairs
from kvkeep.stack.servers.started import find_lent
from kvkeep.stack.spec import EngineSpec, StackSpec, named_ports
from kvkeep.tiers.pool_inode import FILE_HEADER_BYTES, check_replaceable
from kvkeep.tiers.slot_header import DIGEST_BYTES, HEADER_BYTES

HOST = "127.0.0.1"
CPU_KV_CACHE_BYTES = 1 << 30
"""An engine's own KV cache on a CPU where nobody says otherwise; vLLM would take 90 % of the
machine (vllm 0.32, v1/worker/cpu_worker.py)."""
SHM = Path("/dev/shm")
_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_POOL_SLACK_BYTES = 4 << 20
"""Payloads of a pool begin at a huge page, 2 MiB; twice that covers every rounding."""


class _KvShape(msgspec.Struct, frozen=True):
    """What of a model decides how large a block is."""

    num_layers: int
    num_heads: int
    """That keep K and V."""
    head_dim: int
    dtype: str


def _shape_of(engine: EngineSpec, model: Model) -> _KvShape | None:
    """Read a model's configuration; None where it is not here, or says something else."""
    try:
        found = json.loads((Path(model.location) / "config.json").read_text())
        heads = found["num_attention_heads"]
        return _KvShape(
            num_layers=found["num_hidden_layers"],
            num_heads=found.get("num_key_value_heads") or heads,
            head_dim=found.get("head_dim") or found["hidden_size"] // heads,
            dtype=engine.dtype or found.get("dtype") or found["torch_dtype"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_gpu() -> bool:
    """Whether an engine would run on a GPU here."""
    return Path("/dev/nvidiactl").exists()


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or less in a container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def is_port_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # As servers do: a port that a connection of an ended server still lingers on is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def show_bytes(num_bytes: int) -> str:
    """A size for a person, such as ``2 GiB``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{num_bytes} bytes"


def kv_cache_bytes(engine: EngineSpec, *, gpu: bool) -> int | None:
    """Memory for an engine's own KV cache, default applied; None leaves it to the engine."""
    if engine.kv_cache_bytes is not None or gpu:
        return engine.kv_cache_bytes
    return CPU_KV_CACHE_BYTES


def compute_cpus(engine: EngineSpec, allowed: Iterable[int] | None = None) -> str:
    """Cores of an engine's threads, one list per tensor-parallel rank, as ``0,1|2,3``.

    Raises:
        InputError: The cores can't be split over the ranks.
    """
    if isinstance(engine.cpus, str):
        return engine.cpus
    given = engine.cpus is not None
    cores = engine.cpus or sorted(os.sched_getaffinity(0) if allowed is None else allowed)
    share, rest = divmod(len(cores), engine.tensor_parallel)
    if share == 0 or (rest and given):
        raise InputError(
            f"engine {engine.name}: {len(cores)} cores can't be split over "
            f"{engine.tensor_parallel} tensor-parallel ranks; name a multiple of them in cpus."
        )
    ranks = [cores[idx * share : (idx + 1) * share] for idx in range(engine.tensor_parallel)]
    return "|".join(",".join(map(str, rank)) for rank in ranks)


def assigned_gpus(spec: StackSpec) -> dict[str, tuple[str, ...]]:
    """GPUs of each engine by name; without a word here an engine sees them all.

    Raises:
        InputError: There are too few.
    """
    if not has_gpu():
        return {}
    available = find_gpus()
    if not fits_without_a_word(spec.engines, available):
        return {}
    return assign_gpus(spec.engines, available)


def assigned_cores(spec: StackSpec) -> dict[str, list[int]]:
    """Cores of each engine by name, where a router keeps all of them busy at the same time."""
    if has_gpu() or spec.router is None:
        return {}
    return share_cores(spec.engines, os.sched_getaffinity(0))


def size_pool(spec: StackSpec, model: Model) -> StackSpec:
    """Turn a pool's size in blocks into one in bytes.

    Raises:
        InputError: The model's shape is not known here.
    """
    num_blocks = spec.daemon.pool_blocks
    if num_blocks is None:
        return spec
    engine = next((engine for engine in spec.engines if engine.url is None), spec.engines[0])
    shape = _shape_of(engine, model)
    if shape is None or shape.dtype not in _DTYPE_BYTES:
        raise InputError(
            f"daemon.pool_blocks = {num_blocks}: the size of a block of this model is not known "
            "here; set daemon.pool_bytes instead."
        )
    num_pages = shape.num_layers * shape.num_heads
    block_bytes = num_pages * 2 * shape.head_dim * _DTYPE_BYTES[shape.dtype] * engine.block_tokens
    stride = -(-(HEADER_BYTES + DIGEST_BYTES * num_pages) // 64) * 64
    pool_bytes = FILE_HEADER_BYTES + _POOL_SLACK_BYTES + num_blocks * (block_bytes + stride)
    daemon = msgspec.structs.replace(spec.daemon, pool_bytes=max(pool_bytes, 1 << 24))
    return msgspec.structs.replace(spec, daemon=daemon)


def check_shapes(spec: StackSpec, models: Mapping[str, Model]) -> None:
    """Refuse engines whose blocks one pool can't hold; their daemon would, after a minute.

    Args:
        spec: Of the stack.
        models: By the name that the file has for each; what is not known of one is not judged.

    Raises:
        InputError: Two engines' models differ in what a block is made of, or a model's heads can't
            be split over an engine's ranks.
    """
    check_heads(spec, models)
    first: tuple[str, _KvShape] | None = None
    for idx, engine in enumerate(spec.engines):
        name = spec.model_of(engine)
        shape = _shape_of(engine, models[name]) if engine.uses_kvkeep else None
        if shape is None:
            continue
        if first is None:
            first = (name, shape)
        elif shape != first[1]:
            raise InputError(
                f"engines[{idx}].model = {name}: its blocks are not made like those of {first[0]}, "
                "and engines of one daemon keep theirs in one pool; set connector: none, or give "
                "it another stack."
            )


def check_machine(spec: StackSpec) -> None:
    """Refuse a stack that this machine can't run.

    Raises:
        InputError: One sentence that names the field and the mend; nothing was changed.
    """
    if spec.daemon.enabled:
        _check_pool(spec.daemon_settings().pool_path)
    check_pairs(spec, gpu=has_gpu())
    _check_memory(spec)
    _check_cpus(spec)
    assigned_gpus(spec)
    for field, port in named_ports(spec).items():
        if not is_port_free(port):
            raise InputError(
                f"{field} = {port}: another program uses this TCP port; stop it, choose another "
                "port, or 0 for a free one."
            )
    needs_daemon = any(engine.uses_kvkeep for engine in spec.engines)
    if needs_daemon and not spec.daemon.enabled and not Path(spec.socket_path).is_socket():
        raise InputError(
            f"daemon.socket = {spec.socket_path}: no daemon listens there; start one, or set "
            "daemon.enabled: true."
        )


def _check_pool(pool: Path) -> None:
    """Refuse a path that the daemon would, before anything is started."""
    field = f"daemon.settings.pool = {pool}"
    folder = next(path for path in pool.absolute().parents if os.path.lexists(path))
    if not folder.is_dir():
        raise InputError(f"{field}: {folder} is not a folder; choose another path.")
    if not os.path.lexists(pool):
        return
    if pool.is_symlink() or not pool.is_file():
        raise InputError(f"{field}: it is not a file; choose another path.")
    try:
        with pool.open("rb") as file:
            check_replaceable(pool, file.fileno())
    except OSError as error:
        raise InputError(
            f"{field}: it can't be read ({error.strerror}); choose another path."
        ) from error


def _check_memory(spec: StackSpec) -> None:
    total = memory_bytes()
    gpu = has_gpu()
    pool_bytes = spec.daemon.pool_bytes if spec.daemon.enabled else 0
    if pool_bytes > total:
        raise InputError(
            f"daemon.pool_bytes = {show_bytes(pool_bytes)}: this machine has "
            f"{show_bytes(total)} of memory; choose less."
        )
    if pool_bytes:
        pool = spec.daemon_settings().pool_path
        room = shutil.disk_usage(pool.parent).free if pool.parent.is_dir() else pool_bytes
        if pool.is_file():
            room += pool.stat().st_blocks * 512
        if pool_bytes > room:
            raise InputError(
                f"daemon.pool_bytes = {show_bytes(pool_bytes)}: {pool.parent} has "
                f"{show_bytes(room)} free; choose less, or enlarge it."
            )
    held_bytes = pool_bytes
    for field, num_bytes in find_lent(spec.daemon.tiers) if spec.daemon.enabled else ():
        held_bytes += num_bytes
        if held_bytes > total:
            raise InputError(
                f"{field} = {show_bytes(num_bytes)}: the pool and what tiers keep in memory "
                f"together are {show_bytes(held_bytes)}, and this machine has "
                f"{show_bytes(total)}; choose less."
            )
    own = [
        0 if gpu or engine.url else kv_cache_bytes(engine, gpu=gpu) or 0 for engine in spec.engines
    ]
    if held_bytes + sum(own) > total:
        largest = max(range(len(own)), key=own.__getitem__)
        tiers = "" if held_bytes == pool_bytes else ", what tiers keep in memory"
        raise InputError(
            f"engines[{largest}].kv_cache_bytes = {show_bytes(own[largest])}: the pool{tiers} and "
            f"the engines' caches together are {show_bytes(held_bytes + sum(own))}, and this "
            f"machine has {show_bytes(total)}; choose less."
        )


def _check_cpus(spec: StackSpec) -> None:
    allowed = os.sched_getaffinity(0)
    for idx, engine in enumerate(spec.engines):
        if engine.cpus is None:
            continue
        field = f"engines[{idx}].cpus = {engine.cpus}"
        text = compute_cpus(engine, allowed)
        if not re.fullmatch(r"\d+(-\d+)?([,|]\d+(-\d+)?)*", text):
            if text in ("auto", "nobind"):
                continue
            raise InputError(f"{field}: write cores such as 0-1, with | between ranks.")
        if text.count("|") + 1 != engine.tensor_parallel:
            raise InputError(
                f"{field}: tensor_parallel is {engine.tensor_parallel}; "
                "write as many lists, with | between them."
            )
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
            missing = sorted(set(range(int(first), int(last or first) + 1)) - allowed)
            if missing:
                cores = ",".join(map(str, sorted(allowed)))
                raise InputError(f"{field}: there is no core {missing[0]} here, only {cores}.")
