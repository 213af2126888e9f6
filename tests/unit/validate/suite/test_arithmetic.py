"""Arithmetic tasks: right, known, and the same for the same seed."""

import operator
import re

from kvkeep.validate.suite.arithmetic import make_rows, make_tasks

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def test_results_are_right() -> None:
    """Each step's sum is what it says, and the last one is the result."""
    for task in make_tasks(200, 1):
        steps = re.findall(r"([0-9 +*-]+) = (\d+)", task.steps)
        assert steps
        for left, right in steps:
            first, sign, second = left.split()
            assert SIGNS[sign](int(first), int(second)) == int(right), task
        assert int(steps[-1][1]) == task.result > 0


def test_the_seed_decides() -> None:
    """Equal seeds give equal rows, others differ."""
    assert make_rows(6, 1) == make_rows(6, 1) != make_rows(6, 2)


def test_no_answer_stands_in_its_prompt_and_prompts_differ_early() -> None:
    """The question comes last, behind examples of its own."""
    rows = make_rows(20, 3)

    assert all(row["prompt"].endswith("Answer:") for row in rows)
    assert len({row["prompt"][:200] for row in rows}) == 20
    assert all(row["prompt"].count("####") == 4 for row in rows)
