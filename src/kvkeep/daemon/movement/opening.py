"""From the settings of a tier to the tier, wrapped and with a queue before it."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvkeep.core.admission import SIGHTS_MAX, AdmissionPolicy, AdmissionSettings
from kvkeep.daemon.movement.lower_tier import LowerTier
from kvkeep.daemon.tier_settings import (
    AnyTierSettings,
    DiskTierSettings,
    MooncakeTierSettings,
    ObjectStoreTierSettings,
    TierSettings,
    ValkeyTierSettings,
)
from kvkeep.model.clock import Clock
from kvkeep.model.errors import InputError
from kvkeep.tiers.base import BATCH_MAX, FindsRot, Registers, Tier
from kvkeep.tiers.disk.tier import DiskTier
from kvkeep.tiers.io_queue import QueueLimits, TierQueue
from kvkeep.tiers.wrappers.compressed import CompressedTier
from kvkeep.tiers.wrappers.encrypted import EncryptedTier
from kvkeep.tiers.wrappers.metered import MeteredTier
from kvkeep.tiers.wrappers.verified import VerifiedTier

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Own = TypeVar("Own", bound=DataclassInstance)

NUM_SIGHTS_MIN = 1 << 12


def open_tier(settings: AnyTierSettings, value_bytes: int, clock: Clock) -> LowerTier:
    """Open one tier; blocks for the medium, so it is called on a thread of its own.

    Args:
        settings: Of the tier.
        value_bytes: Length of every value that it will keep.
        clock: Monotonic.

    Raises:
        InputError: Something is not installed, or can't be used as the settings say.
    """
    overhead_bytes = VerifiedTier.overhead_bytes
    overhead_bytes += EncryptedTier.overhead_bytes if settings.key_files else 0
    overhead_bytes += CompressedTier.overhead_bytes if settings.compress else 0
    seal = _sealing(settings)  # first: what is missing for it leaves no medium open
    inner = open_medium(settings, value_bytes + overhead_bytes)
    limits = QueueLimits(
        num_threads=settings.num_threads,
        queue_bytes_max=max(settings.queue_bytes_max, 4 * value_bytes),
        deadline_s=settings.deadline_s,
    )
    sealed = seal(inner)
    verified = VerifiedTier(sealed)
    tier = MeteredTier(verified, clock)

    def rejections() -> dict[str, int]:
        found = verified.counts()
        if isinstance(sealed, (EncryptedTier, CompressedTier)):
            found |= {f"sealed_{reason}": number for reason, number in sealed.counts().items()}
        if isinstance(inner, FindsRot):
            reason = "wrong_on_disk" if isinstance(inner, DiskTier) else "damaged_head"
            found[reason] = inner.num_rotten
        return found

    admission = AdmissionSettings(
        capacity_bytes=settings.capacity_bytes,
        probation_share=settings.probation_share,
        write_bytes_per_s=settings.write_bytes_per_s or None,
        num_sights=min(max(NUM_SIGHTS_MIN, settings.capacity_bytes // value_bytes), SIGHTS_MAX),
    )
    return LowerTier(
        TierQueue(tier, limits, clock),
        AdmissionPolicy(admission),
        clock,
        value_bytes=value_bytes,
        is_local=isinstance(settings, DiskTierSettings),
        probes_at_once=1 if isinstance(settings, ObjectStoreTierSettings) else BATCH_MAX,
        rejections=rejections,
    )


def _sealing(settings: AnyTierSettings) -> Callable[[Tier], Tier]:
    """Encryption next to the medium and compression before it: see decision 0013.

    Raises:
        InputError: A key can't be read, or something is not installed.
    """
    seals: list[Callable[[Tier], Tier]] = []
    if settings.key_files:
        from kvkeep.tiers.wrappers.key_ring import KeyRing

        keys = KeyRing.load([Path(name) for name in settings.key_files])
        seals.append(lambda inner: EncryptedTier(inner, keys))
    if settings.compress:
        from kvkeep.tiers.wrappers.codecs import ZstdCodec

        codec = ZstdCodec()
        seals.append(lambda inner: CompressedTier(inner, codec))
    return lambda inner: functools.reduce(lambda tier, seal: seal(tier), seals, inner)


def open_medium(settings: AnyTierSettings, value_bytes_max: int) -> Tier:
    """Open the bare tier.

    Raises:
        InputError: See ``open_tier``.
    """
    name = settings.name or settings.kind
    match settings:
        case DiskTierSettings():
            folder = Path(settings.folder).expanduser()
            disk = DiskTier(folder, settings.capacity_bytes, value_bytes_max)
            disk.name = name
            return disk
        case ValkeyTierSettings():
            from kvkeep.tiers.valkey import ValkeySettings, ValkeyTier

            return ValkeyTier(own_settings(ValkeySettings, settings), name)
        case ObjectStoreTierSettings():
            from kvkeep.tiers.object_store import ObjectStoreSettings, ObjectStoreTier

            return ObjectStoreTier(own_settings(ObjectStoreSettings, settings), name)
        case MooncakeTierSettings():
            from kvkeep.tiers.mooncake.settings import MooncakeSettings
            from kvkeep.tiers.mooncake.tier import MooncakeTier

            own = own_settings(MooncakeSettings, settings, value_bytes_max=value_bytes_max)
            mooncake = MooncakeTier(own)
            mooncake.name = name
            return mooncake


def judge_tiers(tiers: Sequence[AnyTierSettings]) -> None:
    """Refuse what can be known to be wrong without asking any medium.

    Opening a tier says so too, and then the daemon serves without it: a user who mistyped an
    address would notice by misses.

    Raises:
        InputError: Names the tier, what is wrong and the mend.
    """
    for tier in tiers:
        try:
            _sealing(tier)
            _judge_medium(tier)
        except InputError as error:
            raise InputError(f"the tier {tier.name or tier.kind}: {error}") from error


def _judge_medium(settings: AnyTierSettings) -> None:
    match settings:
        case ValkeyTierSettings():
            open_medium(settings, 0).close()  # calls nobody yet
        case ObjectStoreTierSettings() if not settings.url.startswith("file:///"):
            open_medium(settings, 0).close()
        case MooncakeTierSettings():
            from kvkeep.tiers.mooncake.settings import MooncakeSettings

            own_settings(MooncakeSettings, settings, value_bytes_max=1)


def own_settings(kind: "type[Own]", settings: AnyTierSettings, **more: Any) -> "Own":
    """A tier's own settings, from what the daemon was told of this kind under the same names.

    What every kind can be told is about the queue and the wrappers before it, whatever its name.
    """
    told = set(settings.__struct_fields__) - set(TierSettings.__struct_fields__)
    names = [field for field in kind.__dataclass_fields__ if field in told]
    return kind(**{name: getattr(settings, name) for name in names}, **more)


def register_pool(tier: LowerTier, region: memoryview) -> None:
    """Make the pool's memory known to a tier that moves bytes faster then."""
    inner = tier.queue.tier
    if isinstance(inner, Registers):
        inner.register(region)
