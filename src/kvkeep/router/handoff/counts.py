"""What a router counts of its hand-offs: plain integers, and seconds by state."""

from dataclasses import dataclass, field

from kvkeep.router.handoff.machine import HandOff, HandOffState
from kvkeep.router.handoff.plan import SKIPS

OUTCOMES = {
    "handed_off": "requests whose response came from another engine than their prefill",
    "empty": "requests whose prompt had no block to hand over",
    "fell_back": "requests that a decode engine did alone because the hand-off failed",
    "refused": "requests that the prefill engine, or this router, said are wrong",
    "failed": "requests that were answered with an error, or broke off",
    "aborted": "requests whose client left",
}
"""How hand-offs end, each in one way."""
COUNTERS = {
    "released": "offers given up because nobody would fetch them",
    "unreleased": "of these, offers that were left to their lease: no decode engine could be told",
}


@dataclass(slots=True)
class HandOffCounts:
    """Only grows."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    skips: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SKIPS, 0))
    fallbacks: dict[str, int] = field(default_factory=dict)
    """By which leg failed, and how."""
    num_released: int = 0
    num_unreleased: int = 0
    visits: dict[HandOffState, int] = field(default_factory=lambda: dict.fromkeys(HandOffState, 0))
    """How often a state was left."""
    spent_s: dict[HandOffState, float] = field(
        default_factory=lambda: dict.fromkeys(HandOffState, 0.0)
    )
    """How long it lasted, all together."""

    def fell_back(self, label: str) -> None:
        """A decode engine computes a prompt because of this."""
        self.fallbacks[label] = self.fallbacks.get(label, 0) + 1

    def ended(self, machine: HandOff) -> None:
        """A hand-off is over."""
        self.outcomes[outcome_of(machine)] += 1
        for state, seconds in machine.history:
            self.visits[state] += 1
            self.spent_s[state] += seconds


def outcome_of(machine: HandOff) -> str:
    """A key of ``OUTCOMES``; the machine is over."""
    if machine.state is HandOffState.DONE:
        if machine.fallback:
            return "fell_back"
        return "empty" if machine.is_empty else "handed_off"
    if machine.state is HandOffState.ABORTED:
        return "aborted"
    return "refused" if machine.is_refused else "failed"
