"""The arms that have names, nearest first, made of what a stack has."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.validate.arms.comparing import Arm, Before, NumRead, Source
from kvkeep.validate.arms.lower_tiers import POOL, LowerTiers
from kvkeep.validate.load import Endpoint

ARM_NAMES = (
    "cold",
    "cached",
    "reset",
    "disk",
    "remote",
    "other-engine",
    "hand-off",
    "restart",
)
"""From the nearest place of the KV to the farthest."""


@dataclass(frozen=True, slots=True)
class Means:
    """What arms are made of; what is None is not there."""

    engine: Endpoint
    """The engine that computes first."""
    daemon: Endpoint | None = None
    """Where kvkeep's counters are read."""
    other: Endpoint | None = None
    """An engine on the same cache that never saw the prompts."""
    front: Endpoint | None = None
    """A router before prefill engines and ``engine``, which decodes."""
    tiers: LowerTiers | None = None
    """Tiers that may be emptied."""
    restart: Before | None = None
    """Restarts ``engine`` and returns when it is ready."""

    def missing(self, name: str) -> str | None:
        """What there can't be an arm of this name without, in one sentence; None if there can."""
        needed = {
            "disk": (
                self.tiers is not None and self.tiers.disks,
                "a stack that this check started (--stack) with a disk among its daemon's tiers",
            ),
            "remote": (
                self.tiers is not None and self.tiers.remotes,
                "a stack that this check started (--stack) with a tier behind a network",
            ),
            "other-engine": (self.other, "a second engine in the stack file"),
            "hand-off": (self.front, "a router before prefill and decode engines"),
            "restart": (self.restart, "a stack that this check started (--stack)"),
        }
        is_there, what = needed.get(name, (True, ""))
        return None if is_there else f"The arm {name} needs {what}."

    @property
    def names(self) -> list[str]:
        """Arms that can be made of this, nearest first."""
        return [name for name in ARM_NAMES if self.missing(name) is None]

    async def reset(self) -> None:
        """Empty the engine's own cache.

        Raises:
            UnavailableError: It will not be emptied.
        """
        await reset_of(self.engine)


async def reset_of(engine: Endpoint) -> None:
    """Empty an engine's own cache.

    Raises:
        UnavailableError: It will not be emptied.
    """
    report = await engine.reset_prefix_cache()
    if not report.ok:
        raise UnavailableError(f"The engine's cache could not be reset: {report.detail}")


def standard_arms(names: Sequence[str], means: Means, *, run_id: str) -> list[Arm]:
    """Build the arms called ``names``, in that order.

    Where anything is to be reused, an arm ``fill`` that computes and stores everything is put
    before it; its answers are judged like the others.

    Args:
        names: Of `ARM_NAMES`; the first one is the reference.
        means: What they are made of.
        run_id: Unique per run, so that no earlier run's KV is found.

    Raises:
        InputError: A name is unknown, or what its arm needs is missing.
    """
    unknown = [name for name in names if name not in ARM_NAMES]
    if unknown or not names:
        raise InputError(f"Unknown arms {unknown}: take some of {', '.join(ARM_NAMES)}.")
    for name in names:
        if (missing := means.missing(name)) is not None:
            raise InputError(missing)
    arms = [_arm(name, means, run_id) for name in names]
    shared = [i for i, arm in enumerate(arms) if not arm.salt_per_request]
    if shared:
        fill = Arm("fill", means.engine, Source.NOWHERE, run_id, daemon=means.daemon)
        arms.insert(shared[0], fill)
    return arms


def _arm(name: str, means: Means, run_id: str) -> Arm:
    engine, daemon, outside = means.engine, means.daemon, Source.OUTSIDE
    match name:
        case "cold":
            return Arm(name, engine, Source.NOWHERE, f"{run_id}-cold", True, daemon=daemon)
        case "cached":
            return Arm(name, engine, Source.ENGINE, run_id, daemon=daemon)
        case "reset":
            return Arm(name, engine, outside, run_id, before=means.reset, daemon=daemon)
        case "disk" | "remote":
            assert means.tiers is not None
            before, num_read = _emptied(name, means, means.tiers)
            return Arm(
                name, engine, outside, run_id, before=before, daemon=daemon, num_read=num_read
            )
        case "other-engine":
            return Arm(name, means.other or engine, outside, run_id, daemon=daemon)
        case "hand-off":
            salt = f"{run_id}-hand-off"
            return Arm(name, engine, outside, salt, True, daemon=daemon, front=means.front)
        case _:
            return Arm(name, engine, outside, run_id, before=means.restart, daemon=daemon)


def _emptied(name: str, means: Means, tiers: LowerTiers) -> tuple[Before, NumRead]:
    """Everything nearer than the tier is emptied before; and how much was read from the tier."""
    is_disk = name == "disk"
    nearer = [POOL] if is_disk else [POOL, *tiers.disks]
    names = tiers.disks if is_disk else tiers.remotes

    async def before() -> None:
        await tiers.settle()
        await tiers.clear(nearer)
        await means.reset()

    async def num_read() -> int:
        return await tiers.num_read(names)

    return before, num_read
