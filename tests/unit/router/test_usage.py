"""What a response says of its tokens."""

import json

import pytest

from kvkeep.router.usage import TAIL_BYTES_MAX, Usage, find_usage

TOLD = {
    "prompt_tokens": 12,
    "total_tokens": 19,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 8},
}
WHOLE = json.dumps({"id": "x", "choices": [{"text": "hi"}], "usage": TOLD}).encode()
FOUND = Usage(12, 7, 8)


def test_a_whole_response_tells() -> None:
    """However it is spaced, and whatever short follows it."""
    dense = WHOLE.replace(b" ", b"")
    more = WHOLE[:-1] + b', "prompt_logprobs": null, "kv_transfer_params": null}'

    assert [find_usage(b"", body) for body in (WHOLE, dense, more)] == [FOUND] * 3


def test_the_last_event_of_a_stream_tells() -> None:
    """Of several the last counts: vLLM can repeat it in each event."""
    early = WHOLE.replace(b"7", b"1")
    stream = b"data: " + early + b"\n\ndata: " + WHOLE + b"\n\ndata: [DONE]\n\n0\r\n\r\n"

    assert find_usage(b"", stream) == FOUND


@pytest.mark.parametrize("cut", range(1, len(WHOLE), 7))
def test_it_may_be_cut_anywhere(cut: int) -> None:
    """The network ends pieces where it likes."""
    assert find_usage(WHOLE[:cut], WHOLE[cut:]) == FOUND


def test_engines_that_do_not_tell_of_caches_tell_the_rest() -> None:
    """None is not zero."""
    body = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}'

    assert find_usage(b"", body) == Usage(3, 4, None)


def test_embeddings_have_no_completion() -> None:
    """Their usage has prompt tokens only."""
    assert find_usage(b"", b'{"usage":{"prompt_tokens":3,"total_tokens":3}}') == Usage(3, 0, None)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"data: [DONE]\n\n", b'{"usage": null}', b'{"usage": {}}', b'{"usage"'),
        json.dumps({"text": 'say "usage": {"prompt_tokens": 5}'}).encode(),
        WHOLE + b" " * TAIL_BYTES_MAX,
        b'{"usage": {"prompt_tokens": 99999999999999999999}}',
    ],
)
def test_who_says_nothing_is_not_guessed_at(body: bytes) -> None:
    """Text that looks alike, nonsense and what lies too far back count as nothing."""
    assert find_usage(b"", body) is None
