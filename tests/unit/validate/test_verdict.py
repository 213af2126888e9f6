"""Verdicts: every kind is reached by a planted case, and by nothing less."""

import pytest

from kvkeep.validate.answer import Answer, TokenStep
from kvkeep.validate.verdict import (
    Judgement,
    Verdict,
    defect_of,
    foreign_secrets,
    judge,
    near_tie_limit_nats,
    noise_floor,
    without_exercise,
)

BEST = (("a", -0.5), ("b", -0.52), ("c", -2.0), ("d", -4.5))
"""A tie between a and b; c is possible, d hardly."""
CLEAR = (("a", -0.1), ("b", -2.6), ("c", -4.0))


def step(token: str, top: tuple[tuple[str, float], ...] = BEST, moved: float = 0.0) -> TokenStep:
    return TokenStep(token, dict(top).get(token, -9.0) + moved, top)


def answer(*steps: TokenStep, text: str = "some text", finish: str | None = "length") -> Answer:
    return Answer(text=text, steps=steps, finish_reason=finish)


REFERENCE = answer(step("a"), step("a"), step("a"))


def test_equal_tokens_are_identical() -> None:
    """The same token ids with the same logprobs are identical."""
    judged = judge(REFERENCE, answer(step("a"), step("a"), step("a")))

    assert judged.verdict is Verdict.IDENTICAL
    assert judged.logprob_diff_nats == 0.0


def test_the_runner_up_of_a_tie_is_a_near_tie() -> None:
    """A different token is excused where it was the runner-up within the noise."""
    judged = judge(REFERENCE, answer(step("a"), step("b"), step("c")))

    assert judged.verdict is Verdict.NEAR_TIE
    assert judged.position == 1
    assert judged.gap_nats == pytest.approx(0.02)
    assert judged.reference_top == BEST[:2]


def test_the_runner_up_far_behind_is_drift() -> None:
    """A runner-up further behind than the noise explains is drift, not a tie."""
    reference = answer(step("a", CLEAR), step("a", CLEAR))

    judged = judge(reference, answer(step("a", CLEAR), step("b", CLEAR)))

    assert judged.verdict is Verdict.DRIFT
    assert judged.gap_nats == pytest.approx(2.5)


def test_the_third_best_token_is_drift() -> None:
    """A tie excuses the runner-up only, not the token behind it."""
    assert judge(REFERENCE, answer(step("a"), step("c"), step("a"))).verdict is Verdict.DRIFT


@pytest.mark.parametrize("token", ["d", "z"])
def test_an_unlikely_token_is_corruption(token: str) -> None:
    """A token the reference held for hardly possible, or did not rank, is corruption."""
    judged = judge(REFERENCE, answer(step("a"), step(token), step("a")))

    assert judged.verdict is Verdict.CORRUPTION
    assert judged.position == 1


def test_measured_noise_widens_the_tie() -> None:
    """Twice the A/A noise is excused where that is more than a tenth of a nat."""
    top = (("a", -0.5), ("b", -0.8))
    reference, other = answer(step("a", top)), answer(step("b", top))

    assert judge(reference, other).verdict is Verdict.DRIFT
    assert judge(reference, other, noise_nats=0.16).verdict is Verdict.NEAR_TIE
    assert near_tie_limit_nats(0.16) == pytest.approx(0.32)


def test_a_coin_that_falls_too_surely_is_drift() -> None:
    """A tie in the reference that is a clear preference in the answer was no coin toss."""
    sure = (("b", -0.01), ("a", -4.0))

    assert judge(REFERENCE, answer(step("a"), step("b", sure))).verdict is Verdict.DRIFT


def test_moved_logprobs_are_drift_though_tokens_agree() -> None:
    """Wrong KV that has not yet turned a token shows in the logprobs."""
    judged = judge(REFERENCE, answer(step("a"), step("a", moved=-0.4), step("a")))

    assert judged.verdict is Verdict.DRIFT
    assert judged.logprob_diff_nats == pytest.approx(0.4)


def test_a_near_tie_after_moved_logprobs_is_drift() -> None:
    """A tie is no excuse for logprobs that had moved before it."""
    judged = judge(REFERENCE, answer(step("a", moved=-0.4), step("b"), step("a")))

    assert judged.verdict is Verdict.DRIFT


def test_an_answer_that_ends_early_is_drift() -> None:
    """The beginning of the right answer is not the right answer."""
    assert judge(REFERENCE, answer(step("a"), step("a"))).verdict is Verdict.DRIFT


def test_another_end_of_equal_tokens_is_drift() -> None:
    """Equal tokens that ended for another reason are not identical."""
    candidate = answer(step("a"), step("a"), step("a"), finish="stop")

    assert judge(REFERENCE, candidate).verdict is Verdict.DRIFT


def test_exact_mode_calls_a_near_tie_corruption() -> None:
    """Where bits must be equal a near-tie is corruption."""
    candidate = answer(step("a"), step("b"), step("a"))

    assert judge(REFERENCE, candidate).verdict is Verdict.NEAR_TIE
    assert judge(REFERENCE, candidate, exact=True).verdict is Verdict.CORRUPTION


def test_exact_mode_sees_the_last_bit_of_a_logprob() -> None:
    """In the exact mode equal tokens with another logprob are corruption."""
    candidate = answer(step("a"), step("a", moved=1e-15), step("a"))

    assert judge(REFERENCE, candidate).verdict is Verdict.IDENTICAL
    judged = judge(REFERENCE, candidate, exact=True)
    assert judged.verdict is Verdict.CORRUPTION
    assert judged.position == 1


def test_exact_mode_compares_alternatives_too() -> None:
    """In the exact mode the alternatives' logprobs count as well."""
    other = (*BEST[:3], ("d", -4.6))
    candidate = answer(step("a"), step("a"), step("a", other))

    assert judge(REFERENCE, candidate, exact=True).verdict is Verdict.CORRUPTION


def test_exact_mode_without_logprobs_is_an_error() -> None:
    """Equal texts do not prove equal bits."""
    bare = Answer(text="same", finish_reason="length")

    assert judge(bare, bare, exact=True).verdict is Verdict.ERROR


def test_texts_are_compared_where_nothing_else_is_known() -> None:
    """Without logprobs equal texts are identical and different ones drift, never a near-tie."""
    one, other = (Answer(text=text, finish_reason="stop") for text in ("yes", "yes, sir"))

    assert judge(one, one).verdict is Verdict.IDENTICAL
    assert judge(one, other).verdict is Verdict.DRIFT


def test_a_foreign_code_word_is_contamination() -> None:
    """Another prompt's code word in an answer is contamination, even if tokens agree."""
    said = answer(step("a"), text="The code word is Amber-Otter-1234, I think.")

    judged = judge(
        said,
        said,
        own_secrets=["copper-lynx-9999"],
        known_secrets=["copper-lynx-9999", "amber-otter-1234"],
    )

    assert judged.verdict is Verdict.CONTAMINATION
    assert "amber-otter-1234" in judged.reason


def test_the_own_code_word_is_welcome() -> None:
    """A prompt's own code word is no contamination, and too short words are ignored."""
    text = "copper-lynx-9999 and ab"

    assert foreign_secrets(text, ["copper-lynx-9999"], ["copper-lynx-9999", "lynx", "ab"]) == []


def test_contamination_outweighs_an_error() -> None:
    """A leak is reported as a leak even where the answer broke off."""
    candidate = Answer(text="amber-otter-1234", error="cut")

    judged = judge(REFERENCE, candidate, known_secrets=["amber-otter-1234"])

    assert judged.verdict is Verdict.CONTAMINATION


@pytest.mark.parametrize(
    "bad",
    [
        Answer(error="HTTP 500"),
        Answer(),
        Answer(text="", finish_reason="stop"),
        Answer(text="  \n", finish_reason="length"),
        Answer(text="half an ans"),
        Answer(text="", steps=(step("eos"),), finish_reason="stop"),
        answer(step("a"), finish="error"),
        answer(step("a"), finish="abort"),
    ],
    ids=["failed", "only-done", "empty", "blank", "no-finish", "only-eos", "error", "abort"],
)
def test_a_missing_answer_is_an_error(bad: Answer) -> None:
    """Failed, missing and empty answers are errors, on either side, and even if both are so."""
    assert defect_of(bad) is not None
    assert judge(REFERENCE, bad).verdict is Verdict.ERROR
    assert judge(bad, REFERENCE).verdict is Verdict.ERROR
    assert judge(bad, bad).verdict is Verdict.ERROR


def test_blanks_that_were_generated_are_an_answer() -> None:
    """A model may say white space; what counts is that tokens came."""
    blanks = answer(step("a"), step("b"), text="\n\n")

    assert defect_of(blanks) is None


def test_noise_is_the_largest_distance_of_cold_runs() -> None:
    """The noise floor is the largest difference up to the first fork of each pair."""
    left = answer(step("a"), step("a"), step("a"))
    right = answer(step("a", moved=0.03), step("a", moved=-0.07), step("a"))

    assert noise_floor([(left, left)]) == 0.0
    assert noise_floor([(left, left), (left, right)]) == pytest.approx(0.07)


def test_noise_counts_the_fork_but_nothing_behind_it() -> None:
    """Behind a fork two runs answer different questions, so only the fork itself is measured."""
    flipped = (("b", -0.5), ("a", -0.55))
    left = answer(step("a"), step("a", CLEAR))
    right = answer(step("b", flipped), step("a", moved=-3.0))

    assert noise_floor([(left, right)]) == pytest.approx(0.05)


def test_a_pass_that_proves_nothing_is_withdrawn() -> None:
    """Where the path did not run, a pass becomes not-exercised and a failure stays."""
    passed = Judgement(Verdict.IDENTICAL, "equal")
    failed = Judgement(Verdict.CORRUPTION, "wrong")

    withdrawn = without_exercise(passed, "nothing was served")

    assert withdrawn.verdict is Verdict.NOT_EXERCISED
    assert withdrawn.to_dict()["would_be"] == "identical"
    assert without_exercise(failed, "nothing was served") is failed
