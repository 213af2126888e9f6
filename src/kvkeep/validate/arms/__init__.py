"""Arms: the same prompts by different ways to their KV, and where an answer first goes wrong."""

from kvkeep.validate.arms.bisection import Blocks, Suspect, Tally, bisect, suspicious
from kvkeep.validate.arms.comparing import (
    Arm,
    ArmResult,
    ArmsReport,
    Asking,
    Before,
    Source,
    compare_arms,
    run_arm,
)
from kvkeep.validate.arms.lower_tiers import LowerTiers, TierPlaces
from kvkeep.validate.arms.standard import ARM_NAMES, Means, standard_arms

__all__ = [
    "ARM_NAMES",
    "Arm",
    "ArmResult",
    "ArmsReport",
    "Asking",
    "Before",
    "Blocks",
    "LowerTiers",
    "Means",
    "Source",
    "Suspect",
    "Tally",
    "TierPlaces",
    "bisect",
    "compare_arms",
    "run_arm",
    "standard_arms",
    "suspicious",
]
