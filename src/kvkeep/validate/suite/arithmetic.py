"""Grade-school arithmetic in words, made with a seed: tasks whose answers are known.

In the form of GSM8K: a story, steps, and the result behind ``####``. Every task is asked behind
worked examples of its own, so that no two prompts share more than a beginning. GSM8K itself is
asked in the same way where somebody gives it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kvkeep.model.errors import InputError
from kvkeep.validate.prompts import fetch_rows

NUM_EXAMPLES = 4
NAMES = ("Ada", "Ben", "Clara", "Dmitri", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "marbles", "stamps", "shells", "pencils", "buttons", "cards", "coins")


@dataclass(frozen=True, slots=True)
class Task:
    """One story with its solution."""

    question: str
    steps: str
    result: int

    @property
    def solved(self) -> str:
        """As an example shows it."""
        return f"Question: {self.question}\nAnswer: {self.steps}\n#### {self.result}"


def _shared_out(rng: Random) -> Task:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    bags, each, given = rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 5)
    have = bags * each
    return Task(
        f"{name} has {bags} bags with {each} {thing} in each and gives {given} {thing} away. "
        f"How many {thing} does {name} have left?",
        f"{bags} * {each} = {have} {thing}. {have} - {given} = {have - given}.",
        have - given,
    )


def _bought(rng: Random) -> Task:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    num, price, paid = rng.randint(2, 8), rng.randint(2, 9), 100
    cost = num * price
    return Task(
        f"{name} buys {num} {thing} for {price} dollars each and pays with {paid} dollars. "
        "How many dollars come back?",
        f"{num} * {price} = {cost} dollars. {paid} - {cost} = {paid - cost}.",
        paid - cost,
    )


def _saved(rng: Random) -> Task:
    name = rng.choice(NAMES)
    week, weeks, had = rng.randint(3, 15), rng.randint(2, 9), rng.randint(5, 40)
    more = week * weeks
    return Task(
        f"{name} has {had} dollars and saves {week} dollars a week. How many dollars does {name} "
        f"have after {weeks} weeks?",
        f"{week} * {weeks} = {more} dollars. {had} + {more} = {had + more}.",
        had + more,
    )


def _walked(rng: Random) -> Task:
    name = rng.choice(NAMES)
    there, days, more = rng.randint(2, 9), rng.randint(3, 7), rng.randint(1, 9)
    daily = 2 * there
    return Task(
        f"{name} walks {there} miles to school and the same way back on {days} days, and {more} "
        "miles on Sunday. How many miles is that in all?",
        f"2 * {there} = {daily} miles a day. {daily} * {days} = {daily * days}. "
        f"{daily * days} + {more} = {daily * days + more}.",
        daily * days + more,
    )


_KINDS: tuple[Callable[[Random], Task], ...] = (_shared_out, _bought, _saved, _walked)


def make_tasks(num: int, seed: int) -> list[Task]:
    """Tasks of all kinds in turn; the same for the same seed."""
    rng = Random(seed)
    return [_KINDS[i % len(_KINDS)](rng) for i in range(num)]


def read_tasks(place: str) -> list[Task]:
    """Tasks of GSM8K, in a file or behind an address: ``question``, and ``answer`` with ``####``.

    Raises:
        InputError: It can't be read, is something else, or has too few to show examples.
    """
    tasks = []
    for question, answer in fetch_rows(place, "question", "answer"):
        steps, sign, result = answer.rpartition("####")
        digits = result.strip().replace(",", "")
        if not sign or not digits.lstrip("-").isdecimal():
            raise InputError(
                f"{place} is not GSM8K: an answer ends with #### and a whole number, not with "
                f"{answer[-40:]!r}."
            )
        tasks.append(Task(question.strip(), steps.strip(), int(digits)))
    if len(tasks) <= NUM_EXAMPLES:
        raise InputError(f"{place} has {len(tasks)} tasks: {NUM_EXAMPLES + 1} are needed.")
    return tasks


def make_rows(num: int, seed: int, given: Sequence[Task] = ()) -> list[dict[str, str]]:
    """Rows of a data set: ``prompt`` with worked examples in front, and ``answer``.

    Args:
        num: How many; fewer if fewer are given.
        seed: Decides tasks and examples.
        given: Tasks to take instead of making some; the first ``num`` are asked.
    """
    rows = []
    for i, task in enumerate(given[:num] if given else make_tasks(num, seed)):
        if given:
            others = [other for other in given if other is not task]
            examples = Random(seed + 1000 + i).sample(others, NUM_EXAMPLES)
        else:
            examples = make_tasks(NUM_EXAMPLES, seed + 1000 + i)
        shown = "\n\n".join(example.solved for example in examples)
        prompt = f"Sheet {i + 1}.\n\n{shown}\n\nQuestion: {task.question}\nAnswer:"
        rows.append({"prompt": prompt, "answer": str(task.result)})
    return rows
