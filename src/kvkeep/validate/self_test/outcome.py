"""What a self-test found, whole: every stand, and the tiers below the pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvkeep.validate.self_test.lower_tiers import TierScore
from kvkeep.validate.self_test.score import StandScore

FORM = "kvkeep.check.self-test/1"


@dataclass(frozen=True, slots=True)
class SelfTest:
    """All scores of one self-test."""

    seed: int
    stands: Sequence[StandScore]
    tiers: Sequence[TierScore]

    @property
    def passed(self) -> bool:
        """Every stand passed, and no tier gave out a wrong value."""
        return all(stand.passed for stand in self.stands) and all(
            tier.caught == tier.planted and not tier.wrong_values for tier in self.tiers
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, documented in docs/check-report.md."""
        return {
            "schema": FORM,
            "passed": self.passed,
            "seed": self.seed,
            "stands": [stand.to_dict() for stand in self.stands],
            "tiers": [tier.to_dict() for tier in self.tiers],
        }
