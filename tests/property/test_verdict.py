"""Properties of verdicts over arbitrary answers."""

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.validate.answer import Answer, TokenStep
from kvkeep.validate.counters import servable_of_one, servable_tokens
from kvkeep.validate.verdict import PASSING, Verdict, judge, near_tie_limit_nats, noise_floor

TOKENS = st.sampled_from("abcdefgh")
LOGPROBS = st.floats(-12.0, 0.0)


@st.composite
def steps(draw: st.DrawFn) -> TokenStep:
    ranked = draw(st.lists(TOKENS, min_size=2, max_size=5, unique=True))
    values = sorted((draw(LOGPROBS) for _ in ranked), reverse=True)
    top = tuple(zip(ranked, values, strict=True))
    return TokenStep(top[0][0], top[0][1], top)


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    made = tuple(draw(st.lists(steps(), min_size=1, max_size=6)))
    return Answer(text="text", steps=made, finish_reason="length")


@given(answers(), st.booleans(), st.floats(0.0, 2.0))
def test_an_answer_agrees_with_itself(answer: Answer, exact: bool, noise_nats: float) -> None:
    """Whatever the mode and the noise, an answer is identical to itself."""
    judged = judge(answer, answer, exact=exact, noise_nats=noise_nats)

    assert judged.verdict is Verdict.IDENTICAL


@given(answers(), answers())
def test_the_exact_mode_passes_only_equal_answers(left: Answer, right: Answer) -> None:
    """In the exact mode a pass and equality are the same thing, and nothing lies between."""
    judged = judge(left, right, exact=True)

    assert (judged.verdict in PASSING) == (left == right)
    assert judged.verdict in (Verdict.IDENTICAL, Verdict.CORRUPTION)


@given(answers(), answers(), st.floats(0.0, 1.0))
def test_a_pass_differs_by_a_tie_at_most(left: Answer, right: Answer, noise_nats: float) -> None:
    """A passing answer has the same tokens, or forks at the runner-up within the limit."""
    judged = judge(left, right, noise_nats=noise_nats)
    limit_nats = near_tie_limit_nats(noise_nats)

    if judged.verdict is Verdict.IDENTICAL:
        assert left.token_ids == right.token_ids
    if judged.verdict is Verdict.NEAR_TIE:
        assert judged.position is not None
        fork = judged.position
        assert (left.token_ids or ())[:fork] == (right.token_ids or ())[:fork]
        assert right.steps[fork].token == left.steps[fork].top[1][0]
        assert left.steps[fork].top[0][1] - left.steps[fork].top[1][1] <= limit_nats


@given(answers(), answers(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_more_noise_never_turns_a_pass_into_a_failure(
    left: Answer, right: Answer, one: float, two: float
) -> None:
    """A stack that is noisier is judged more kindly, never more harshly."""
    quiet, noisy = sorted((one, two))

    if judge(left, right, noise_nats=quiet).verdict in PASSING:
        assert judge(left, right, noise_nats=noisy).verdict in PASSING


@given(answers(), answers())
def test_noise_is_symmetric(left: Answer, right: Answer) -> None:
    """It does not matter which cold run came first."""
    assert noise_floor([(left, right)]) == noise_floor([(right, left)])


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=6),
    st.integers(1, 8),
)
def test_servable_tokens_agree_with_a_naive_count(
    prompts: list[list[int]], block_tokens: int
) -> None:
    """The tree of blocks counts what comparing whole prefixes would count."""
    seen: set[tuple[int, ...]] = set()
    external = local = 0
    for ids in prompts:
        for end in range(block_tokens, len(ids), block_tokens):
            prefix = tuple(ids[:end])
            local += block_tokens * (prefix in seen)
            external += block_tokens * (prefix not in seen)
            seen.add(prefix)

    servable = servable_tokens(prompts, block_tokens)

    assert (external, local) == (servable.external_tokens, servable.local_tokens)
    assert external + local == sum(servable_of_one(len(ids), block_tokens) for ids in prompts)
