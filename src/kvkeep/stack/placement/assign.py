"""How GPUs and cores are shared out between the engines of a stack. Pure.

Engines that do prefill choose first: they compute the most, so that theirs are the first and, on
most machines, neighbouring GPUs.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvkeep.model.errors import InputError

if TYPE_CHECKING:
    from kvkeep.stack.spec import EngineSpec

_TURNS = {"prefill": 0, "decode": 1, "serve": 2}
VISIBLE = "CUDA_VISIBLE_DEVICES"


def find_gpus(
    environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> list[str]:
    """Names of the GPUs that engines may use here, as CUDA_VISIBLE_DEVICES has them."""
    named = environment.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    count = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    return [str(idx) for idx in range(count)]


def in_turn(engines: Iterable["EngineSpec"]) -> list["EngineSpec"]:
    """Engines that are started here, in the order in which they choose."""
    return sorted(
        (engine for engine in engines if engine.url is None),
        key=lambda engine: _TURNS[engine.role],
    )


def num_gpus(engine: "EngineSpec") -> int:
    """How many GPUs an engine is to have."""
    if isinstance(engine.gpus, int):
        return engine.gpus
    return engine.tensor_parallel if engine.gpus is None else len(engine.gpus)


def assign_gpus(
    engines: Sequence["EngineSpec"], available: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Give each engine GPUs of its own, but for those that name theirs.

    Args:
        engines: Of a stack; those with CUDA_VISIBLE_DEVICES in ``env`` see to themselves.
        available: From `find_gpus`.

    Returns:
        GPUs by the engine's name.

    Raises:
        InputError: There are too few, or a named one is not there.
    """
    assigned: dict[str, tuple[str, ...]] = {}
    choosing = [engine for engine in in_turn(engines) if VISIBLE not in engine.env]
    for engine in choosing:
        if isinstance(engine.gpus, list):
            named = tuple(str(gpu) for gpu in engine.gpus)
            missing = [name for name in named if name not in available]
            if missing:
                raise InputError(
                    f"engine {engine.name}: there is no GPU {missing[0]} here, only "
                    f"{', '.join(available) or 'none'}; choose from these in gpus."
                )
            assigned[engine.name] = named
    taken = {gpu for named in assigned.values() for gpu in named}
    free = [gpu for gpu in available if gpu not in taken]
    for engine in choosing:
        if engine.name in assigned:
            continue
        wanted = num_gpus(engine)
        if wanted > len(free):
            raise InputError(
                f"engine {engine.name}: it needs {_gpus(wanted)}, and of the "
                f"{_gpus(len(available))} here {len(free)} are left; lower tensor_parallel or "
                "gpus, leave an engine out, or name the same GPUs for several, such as gpus: [0]."
            )
        assigned[engine.name] = tuple(free[:wanted])
        free = free[wanted:]
    return assigned


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def fits_without_a_word(engines: Sequence["EngineSpec"], available: Sequence[str]) -> bool:
    """Whether GPUs should be assigned to engines of which none says anything about them.

    Where there are too few they share all, as engines do that are asked one after the other.
    """
    if any(engine.gpus is not None or engine.role != "serve" for engine in engines):
        return True
    return sum(map(num_gpus, in_turn(engines))) <= len(available)


def share_cores(engines: Sequence["EngineSpec"], allowed: Iterable[int]) -> dict[str, list[int]]:
    """Give each engine that names no cores some of its own, as many for each rank.

    Args:
        engines: Of a stack whose router keeps them busy at the same time.
        allowed: Cores of this machine.

    Returns:
        Cores by the engine's name; nothing where there are fewer cores than ranks: they share.
    """
    sharing = [engine for engine in in_turn(engines) if engine.cpus is None]
    named = {core for engine in engines if isinstance(engine.cpus, list) for core in engine.cpus}
    cores = sorted(set(allowed) - named) or sorted(allowed)
    num_ranks = sum(engine.tensor_parallel for engine in sharing)
    if not sharing or any(isinstance(engine.cpus, str) for engine in engines):
        return {}
    each, rest = divmod(len(cores), num_ranks)
    if each == 0:
        return {}
    shares: dict[str, list[int]] = {}
    for engine in sharing:
        more = engine.tensor_parallel if rest >= engine.tensor_parallel else 0
        count, rest = each * engine.tensor_parallel + more, rest - more
        shares[engine.name], cores = cores[:count], cores[count:]
    return shares
