"""A node under faults stays safe and recovers, over seeds that anyone can run again."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.core.blocks import BlockLedger, Slot
from kvkeep.core.leases import WriteLease
from kvkeep.core.node import NodeState
from kvkeep.model.errors import InvariantError
from kvkeep.model.ids import UNKNOWN_PID, Namespace
from kvkeep.testing.faults import Fault, FaultPlan
from kvkeep.testing.simulated_pool import Auditor, SafetyError
from kvkeep.testing.simulator import Simulation, SimulationSettings

NUM_SEEDS = int(os.environ.get("SIMULATION_SEEDS", "200"))
NUM_PARTS = 4
CALM = FaultPlan(per_minute={})
ROUGH = FaultPlan(
    per_minute={
        Fault.ENGINE_FREEZE: 90.0,
        Fault.DAEMON_FREEZE: 10.0,
        Fault.DAEMON_DEATH: 30.0,
        Fault.LINK_CUT: 10.0,
        Fault.CLEAR: 10.0,
    }
)
SHAPES = [
    SimulationSettings(num_slots=4, head_masks=(1, 2, 1, 2), faults=ROUGH),
    SimulationSettings(),
    SimulationSettings(num_slots=4),
    SimulationSettings(num_slots=12, head_masks=(1, 2, 1, 2)),
    SimulationSettings(num_slots=3, head_masks=(3, 3, 3, 3, 1, 2)),
]
"""Plenty and little room, whole engines and ranks; a seed takes the one at its remainder."""
REGRESSIONS = [
    int(line.split("#")[0])
    for line in (Path(__file__).parent / "regressions.txt").read_text().splitlines()
    if line.split("#")[0].strip()
]


def run(seed: int) -> Simulation:
    simulation = Simulation(seed, SHAPES[seed % len(SHAPES)])
    try:
        return simulation.run()
    except (SafetyError, InvariantError, AssertionError) as error:
        error.add_note(f"seed {seed}\n{simulation.story(40)}")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_no_seed_breaks_a_promise(part: int) -> None:
    """No wrong byte is read, no lent block vanishes, no late write lands, and all ends."""
    runs = [run(seed) for seed in range(part, NUM_SEEDS, NUM_PARTS)]

    assert sum(each.num_loaded for each in runs) > 100 * len(runs)
    assert sum(each.num_fenced for each in runs) > 0
    assert sum(each.auditor.num_refused for each in runs) > 0


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_a_seed_that_once_failed(seed: int) -> None:
    """What once broke a promise does not break it again."""
    run(seed)


def test_a_seed_is_a_whole_run() -> None:
    """The same seed gives the same events to the last digit, another seed does not."""
    one, again, other = run(7), run(7), run(8)

    assert one.events == again.events
    assert one.events != other.events


def test_without_faults_every_block_is_served() -> None:
    """A calm node loads nearly everything, refuses nothing and fences nothing."""
    simulation = Simulation(1, SimulationSettings(num_slots=12, faults=CALM)).run()

    assert simulation.num_loaded > 800
    assert simulation.num_fenced == 0
    assert simulation.auditor.num_refused == 0


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name.lower())
def test_one_kind_of_fault_at_a_time(fault: Fault) -> None:
    """Each fault alone, far more often than in life, breaks nothing."""
    faults = FaultPlan(per_minute={fault: 60.0})
    for seed in range(5):
        simulation = Simulation(seed, SimulationSettings(faults=faults)).run()

        assert simulation.num_loaded > 0
        assert fault in [what for _, _, what in simulation.events]


# ---- planted bugs: a simulation that finds nothing proves nothing


def _evict_lent_blocks(ledger: BlockLedger, num_blocks: int, _: Namespace) -> list[Slot]:
    victims = ledger.accounts.others.policy.victims(num_blocks, lambda _: True)
    slots = [ledger.slots[idx] for idx in victims]
    for slot in slots:
        slot.num_pins = 0
        ledger._forget(slot)
    return slots


def _free_at_the_deadline(node: NodeState, leases: Iterable[WriteLease]) -> list[do.Effect]:
    effects: list[do.Effect] = []
    for lease in leases:
        node.writes.end(lease)
        effects += node._quiet(lease)
    return effects


def _ready_without_all_heads(ledger: BlockLedger, slot: Slot, head_mask: int) -> bool:
    slot.missing_heads = 0
    return _finish_heads(ledger, slot, head_mask)


def _name_the_first_writer(node: NodeState, event: on.StoreAsked, now_s: float) -> list[do.Effect]:
    effects = _store_asked(node, event, now_s)
    return [e for e in effects if not isinstance(e, do.MarkWriting) or e.pid != UNKNOWN_PID]


def _quiet_of_later_sessions(
    node: NodeState, event: on.HolderQuiet, now_s: float
) -> list[do.Effect]:
    return _holder_quiet(node, on.HolderQuiet(event.pid), now_s)


def _fence_for_good(_node: NodeState, _event: on.HolderQuiet, _now_s: float) -> list[do.Effect]:
    return []


def _accept_any_digest(
    auditor: Auditor, key: object, head_idx: int, halves: list[bytes], _digest: bytes
) -> bool:
    from kvkeep.testing.simulated_pool import digest_of

    return _check_read(auditor, key, head_idx, halves, digest_of(halves))  # type: ignore[arg-type]


_finish_heads = BlockLedger.finish_heads
_holder_quiet = NodeState._holder_quiet
_store_asked = NodeState._store_asked
_check_read = Auditor.check_read

PLANTED: list[tuple[type, str, Callable[..., object]]] = [
    (BlockLedger, "evict", _evict_lent_blocks),
    (NodeState, "_lose", _free_at_the_deadline),
    (BlockLedger, "finish_heads", _ready_without_all_heads),
    (NodeState, "_store_asked", _name_the_first_writer),
    (NodeState, "_holder_quiet", _quiet_of_later_sessions),
    (NodeState, "_holder_quiet", _fence_for_good),
    (Auditor, "check_read", _accept_any_digest),
]


@pytest.mark.parametrize(
    ("owner", "name", "bug"), PLANTED, ids=[row[2].__name__ for row in PLANTED]
)
@pytest.mark.parametrize("is_check_on", [True, False], ids=["", "auditor alone"])
def test_the_simulation_finds_a_planted_bug(
    owner: type,
    name: str,
    bug: Callable[..., object],
    is_check_on: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one of these bugs some seed breaks a promise, even if the core does not notice."""
    monkeypatch.setattr(owner, name, bug)
    if not is_check_on:
        monkeypatch.setattr(NodeState, "check", lambda _: None)

    with pytest.raises((SafetyError, InvariantError, AssertionError)):
        [run(seed) for seed in range(200, 300)]
