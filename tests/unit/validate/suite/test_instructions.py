"""Instruction prompts: the same for the same seed, with a passage and a code word each."""

from kvkeep.validate.prompts import load_words
from kvkeep.validate.suite.instructions import instruction_prompts


def test_the_seed_decides() -> None:
    """Equal seeds give equal prompts, another seed others."""
    words = load_words()

    assert instruction_prompts(5, 30, 1, words) == instruction_prompts(5, 30, 1, words)
    assert instruction_prompts(5, 30, 1, words) != instruction_prompts(5, 30, 2, words)


def test_prompts_are_distinct_and_long_enough() -> None:
    """None repeats, each holds its own code word, and a passage of the length asked for."""
    prompts, data = instruction_prompts(40, 50, 3, load_words())

    assert len({prompt.text for prompt in prompts}) == 40
    assert all(prompt.secrets[0] in prompt.text for prompt in prompts)
    assert all(len(prompt.text.split()) > 55 for prompt in prompts)
    assert data
