"""Answers: the small questions that verdicts ask of them."""

from kvkeep.validate.answer import Answer, TokenStep


def test_a_runner_up_needs_two_alternatives() -> None:
    """The runner-up is the second of the reported tokens, or nobody."""
    two = TokenStep("a", -0.1, (("a", -0.1), ("b", -2.0)))

    assert two.runner_up == ("b", -2.0)
    assert TokenStep("a", -0.1, two.top[:1]).runner_up is None


def test_an_answer_without_steps_has_no_tokens() -> None:
    """No logprobs means unknown tokens, which is not the same as no tokens."""
    assert Answer(text="hello").token_ids is None
    assert Answer(steps=(TokenStep("a", -0.1),)).token_ids == ("a",)


def test_the_evidence_leaves_the_prompt_out() -> None:
    """Reports hold what was answered; prompts can be made again from the seed."""
    evidence = Answer(text="x", prompt_token_ids=(1, 2), prompt_tokens=2).to_dict()

    assert "prompt_token_ids" not in evidence
    assert evidence["prompt_tokens"] == 2
