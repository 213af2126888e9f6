"""Whatever ends ``kvkeep check`` at whatever moment: no process, memory or temporary file stays.

The moment is the n-th thing that it says it does, and a fraction of a second more, so that it falls
into the start of its stack, between two suites, amid a phase, or into the stop.
"""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from random import Random

import pytest

from tests.integration.checked_stacks import CheckedStack, checked_stack

pytestmark = [pytest.mark.fault, pytest.mark.kvbm]

STAGE = re.compile(r"^(daemon|engine \w): |: \d+ (answered|of \d)")
STAGES = 26
"""About as many as there are from its start to its end."""
AMID_S = 0.4
"""A phase takes about so long."""
MOMENTS_NIGHTLY = 12
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


@pytest.fixture
def stack() -> Iterator[CheckedStack]:
    """A stack file, and folders to look into."""
    with checked_stack() as made:
        yield made


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """That of the run of all tests, which prints it."""
    return int(request.config.getoption("randomly_seed", 0))


def interrupt(stack: CheckedStack, number: signal.Signals, chance: Random) -> str:
    """Run the group until some moment, and send it a signal; returns what it had said."""
    said: list[str] = []
    num_left, more_s = chance.randrange(STAGES), chance.uniform(0.0, AMID_S)
    with stack.begin("quick") as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            num_left -= bool(STAGE.search(line))
            if num_left < 0:
                break
        try:
            process.wait(more_s)  # the moment within a phase; nothing is waited for
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            if number is signal.SIGINT:
                process.send_signal(signal.SIGTERM)  # whoever is in a hurry does it twice
        said += process.stdout
    return "".join(said)


def check_interrupted(stack: CheckedStack, number: signal.Signals, seed: int) -> None:
    """Interrupt it once, and find nothing; after SIGKILL the next start has to clear up."""
    said = interrupt(stack, number, Random(seed))
    if number is signal.SIGKILL:
        while stack.processes():  # they notice by themselves; the test's time limit is the only one
            time.sleep(0.05)
        with stack.begin("generation") as again:
            words, _ = again.communicate()
        assert again.returncode == 0, f"seed {seed}: {words}"
        assert [run["suite"] for run in stack.runs()] == ["generation"]

    assert stack.leftovers() == [], f"seed {seed}, interrupted after:\n{said}"
    # What the report has of suites is whole, or it is not there.
    assert all(run["outcome"] for run in stack.runs())


@pytest.mark.timeout(300, func_only=True)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: str(number.name))
def test_an_interrupted_group_leaves_nothing(
    stack: CheckedStack, number: signal.Signals, seed: int
) -> None:
    """One moment for each signal, another one each time the tests run."""
    check_interrupted(stack, number, seed)


@pytest.mark.nightly
@pytest.mark.timeout(900, func_only=True)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: str(number.name))
def test_no_moment_leaves_anything(stack: CheckedStack, number: signal.Signals, seed: int) -> None:
    """Many moments, one after the other over the same folder."""
    for idx in range(MOMENTS_NIGHTLY):
        check_interrupted(stack, number, seed + idx)
