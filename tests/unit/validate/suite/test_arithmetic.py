"""Arithmetic tasks: right, known, and the same for the same seed."""

import json
import operator
import re
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.validate.suite.arithmetic import NUM_EXAMPLES, make_rows, make_tasks, read_tasks

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


def gsm8k(folder: Path, *answers: str) -> str:
    """A file in GSM8K's form."""
    file = folder / "test split.jsonl"
    rows = [{"question": f"Question {i}?", "answer": text} for i, text in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_given_tasks_are_asked_behind_others_of_them(tmp_path: Path) -> None:
    """In the order of the file, each behind worked examples that are not itself."""
    answers = [f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}" for i in range(996, 1004)]
    tasks = read_tasks(gsm8k(tmp_path, *answers))

    rows = make_rows(5, 1, tasks)

    assert [row["answer"] for row in rows] == ["997", "998", "999", "1000", "1001"]
    for i, row in enumerate(rows):
        assert row["prompt"].endswith(f"Question: Question {i}?\nAnswer:")
        assert row["prompt"].count(f"Question {i}?") == 1
        assert row["prompt"].count("####") == NUM_EXAMPLES
    assert make_rows(5, 1, tasks) == rows != make_rows(5, 2, tasks)
    assert len(make_rows(100, 1, tasks)) == 8


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["no result"] * 9, "is not GSM8K"),
        (["x #### many"] * 9, "is not GSM8K"),
        (["x #### 1"] * NUM_EXAMPLES, "5 are needed"),
        ([], "is no use"),
    ],
)
def test_what_is_no_gsm8k_is_refused(tmp_path: Path, answers: list[str], said: str) -> None:
    """In one sentence that names the file."""
    with pytest.raises(InputError, match=said):
        read_tasks(gsm8k(tmp_path, *answers))
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match="no such data set"):
        read_tasks(str(other))
    with pytest.raises(InputError, match="can't be read"):
        read_tasks(str(tmp_path / "gone.jsonl"))
