"""Hand-offs under faults at every point, many times each, in virtual time."""

import asyncio

import pytest

from kvkeep.testing.fleet.hand_off import FAULTS, POINTS, HandOffSimulation

SEEDS = 50
STRUCK_MIN = 0.5
"""Share of the runs in which the victim came to the point."""


def run_all(simulations: list[HandOffSimulation]) -> None:
    async def run() -> None:
        for simulation in simulations:
            await simulation.run()

    asyncio.run(run())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", POINTS)
def test_a_fault_costs_its_own_request_at_most(point: str, fault: str) -> None:
    """No client hangs or gets another's answer, no block stays held, and all is well again."""
    simulations = [HandOffSimulation(seed, point, fault) for seed in range(SEEDS)]
    run_all(simulations)

    for seed, simulation in enumerate(simulations):
        simulation.check_idle()
        try:
            simulation.check_answers()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {point}, {fault}") from error
    assert sum(each.was_struck for each in simulations) >= STRUCK_MIN * SEEDS
