"""What a request passes before it is routed."""

from typing import Any

from kvkeep.router.limits.admission import Visit, VisitState
from kvkeep.router.limits.gate import Gate, LimitSettings, Refusal
from kvkeep.router.limits.keys import ApiKey, KeyRing

SECRET = "sk-0123456789abcdef"
SHOWN = f"Bearer {SECRET}".encode()


class Told:
    """What a waiting request was told."""

    def __init__(self) -> None:
        self.decisions: list[Refusal | None] = []

    def __call__(self, refusal: Refusal | None) -> None:
        self.decisions.append(refusal)


def gate_of(*keys: ApiKey, in_flight_max: int = 1, queue_max: int = 1) -> Gate:
    settings = LimitSettings(in_flight_max=in_flight_max, queue_max=queue_max, queue_wait_s=5.0)
    return Gate(settings, KeyRing(keys) if keys else None)


def arrive(
    gate: Gate, shown: bytes | None = None, now_s: float = 0.0, num_tokens: int = 0
) -> tuple[object, Told]:
    told = Told()
    return gate.arrive(shown, now_s, told, num_tokens), told


def gate_of_tokens(per_min: float, **more: Any) -> Gate:
    key = ApiKey(name="a", key=SECRET, prompt_tokens_per_min=per_min, **more)
    return gate_of(key, in_flight_max=0)


def refused(found: object) -> tuple[int, str, bool]:
    assert isinstance(found, Refusal)
    return found.status, found.code, found.retry_after_s is not None


def admitted(found: object) -> Visit:
    assert isinstance(found, Visit)
    assert found.state is VisitState.ADMITTED
    return found


def test_a_request_without_a_known_key_is_refused() -> None:
    """401, and trying again is of no use."""
    gate = gate_of(ApiKey(name="a", key=SECRET))

    assert refused(arrive(gate)[0]) == (401, "invalid_api_key", False)
    assert refused(arrive(gate, b"Bearer wrong")[0]) == (401, "invalid_api_key", False)
    assert gate.num_refused["invalid_api_key"] == 2
    admitted(arrive(gate, SHOWN)[0])


def test_where_no_keys_are_asked_for_any_header_passes() -> None:
    """The header may be for the engines."""
    admitted(arrive(gate_of(), b"Bearer of the engine")[0])


def test_a_key_beyond_its_rate_is_told_when_to_come_back() -> None:
    """429 with the seconds until the next request is in the rate; then it passes."""
    gate = gate_of(ApiKey(name="a", key=SECRET, requests_per_s=0.25, burst=1), in_flight_max=0)
    admitted(arrive(gate, SHOWN, 0.0)[0])
    found, _ = arrive(gate, SHOWN, 1.0)

    assert refused(found) == (429, "rate_limit_exceeded", True)
    assert isinstance(found, Refusal)
    assert found.retry_after_s == 3
    admitted(arrive(gate, SHOWN, 4.0)[0])


def test_a_key_beyond_its_prompt_tokens_is_told_when_to_come_back() -> None:
    """429 that says how many there may be and were, with the seconds until so many are in it."""
    gate = gate_of_tokens(600)
    admitted(arrive(gate, SHOWN, 0.0, 500)[0])
    found, _ = arrive(gate, SHOWN, 1.0, 200)

    assert refused(found) == (429, "token_limit_exceeded", True)
    assert isinstance(found, Refusal)
    assert found.retry_after_s == 9
    assert "600 prompt tokens each minute" in found.message
    assert "about 200" in found.message
    assert gate.num_refused["token_limit_exceeded"] == 1
    admitted(arrive(gate, SHOWN, 10.0, 200)[0])


def test_an_estimate_is_put_right_by_what_the_engine_counted() -> None:
    """Fewer tokens than thought come back; more are owed; silence leaves the estimate."""
    gate = gate_of_tokens(600)
    gate.leave(admitted(arrive(gate, SHOWN, 0.0, 600)[0]), 0.0, 100)
    gate.leave(admitted(arrive(gate, SHOWN, 0.0, 500)[0]), 0.0, 600)
    assert refused(arrive(gate, SHOWN, 10.0, 1)[0])[1] == "token_limit_exceeded"
    gate.leave(admitted(arrive(gate, SHOWN, 10.1, 1)[0]), 10.1)

    assert refused(arrive(gate, SHOWN, 10.1, 1)[0])[1] == "token_limit_exceeded"


def test_what_no_engine_was_sent_costs_no_tokens() -> None:
    """Whether its client left while it waited, or it waited in vain, or found no place."""
    key = ApiKey(name="a", key=SECRET, prompt_tokens_per_min=600)
    gate = gate_of(key)
    arrive(gate, SHOWN, 0.0, 0)
    waiting, _ = arrive(gate, SHOWN, 0.0, 600)
    assert isinstance(waiting, Visit)
    gate.leave(waiting, 0.0)
    late, told = arrive(gate, SHOWN, 0.0, 600)
    assert isinstance(late, Visit)
    gate.tick(5.0)
    assert [refused(each)[1] for each in told.decisions] == ["queue_timeout"]
    arrive(gate, SHOWN, 5.0, 0)
    assert refused(arrive(gate, SHOWN, 5.0, 600)[0])[1] == "queue_full"

    assert refused(arrive(gate, SHOWN, 5.0, 600)[0])[1] == "queue_full"


def test_what_one_rate_refuses_is_not_taken_of_the_other() -> None:
    """Of requests and of tokens alike."""
    gate = gate_of_tokens(600, requests_per_s=1, burst=2)
    admitted(arrive(gate, SHOWN, 0.0, 600)[0])
    assert refused(arrive(gate, SHOWN, 0.0, 100)[0])[1] == "token_limit_exceeded"
    admitted(arrive(gate, SHOWN, 0.0, 0)[0])
    assert refused(arrive(gate, SHOWN, 0.5, 5)[0])[1] == "rate_limit_exceeded"

    admitted(arrive(gate, SHOWN, 1.0, 10)[0])


def test_a_key_beyond_what_it_may_have_at_once_is_refused() -> None:
    """429 until one of its requests ends; what it has waiting counts too."""
    gate = gate_of(ApiKey(name="a", key=SECRET, in_flight_max=2), in_flight_max=1)
    first = admitted(arrive(gate, SHOWN)[0])
    arrive(gate, SHOWN)

    assert refused(arrive(gate, SHOWN)[0]) == (429, "concurrency_limit_exceeded", True)
    gate.leave(first, 1.0)
    assert isinstance(arrive(gate, SHOWN, 1.0)[0], Visit)


def test_who_waits_is_told_once_that_it_may_go_on() -> None:
    """The end of one request is the beginning of the next."""
    gate = gate_of()
    first = admitted(arrive(gate)[0])
    second, told = arrive(gate)
    assert told.decisions == []
    gate.leave(first, 1.0)

    assert told.decisions == [None]
    admitted(second)
    gate.tick(100.0)
    assert told.decisions == [None]


def test_who_waits_too_long_is_told_so() -> None:
    """503 at the deadline, and the place in the queue is free again."""
    gate = gate_of()
    arrive(gate)
    _, told = arrive(gate)
    gate.tick(4.9)
    assert told.decisions == []
    gate.tick(gate.next_deadline_s or 0.0)

    assert [refused(found) for found in told.decisions] == [(503, "queue_timeout", True)]
    assert (gate.num_waiting, gate.next_deadline_s) == (0, None)


def test_a_full_queue_is_told_at_once() -> None:
    """503 with Retry-After."""
    gate = gate_of()
    arrive(gate)
    arrive(gate)

    assert refused(arrive(gate)[0]) == (503, "queue_full", True)


def test_one_key_pushes_out_the_newest_of_a_greedy_one() -> None:
    """The one that is pushed out is told, and counted."""
    other = ApiKey(name="b", key=SECRET + "b")
    gate = gate_of(ApiKey(name="a", key=SECRET), other, queue_max=2)
    arrive(gate, SHOWN)
    _, old = arrive(gate, SHOWN)
    _, new = arrive(gate, SHOWN)
    arrive(gate, f"Bearer {SECRET}b".encode())

    assert old.decisions == []
    assert [refused(found) for found in new.decisions] == [(503, "queue_full", True)]
    assert gate.num_refused["queue_full"] == 1


def test_who_gives_up_waiting_is_told_nothing() -> None:
    """A client that left has nobody to tell."""
    gate = gate_of()
    first = admitted(arrive(gate)[0])
    second, told = arrive(gate)
    assert isinstance(second, Visit)
    gate.leave(second, 1.0)
    gate.leave(first, 2.0)

    assert (told.decisions, gate.num_running, gate.num_waiting) == ([], 0, 0)
    assert gate._waiting == {}


def test_a_draining_router_serves_who_waits_and_takes_nobody_in() -> None:
    """What was taken on is done."""
    gate = gate_of()
    first = admitted(arrive(gate)[0])
    _, told = arrive(gate)
    gate.drain()

    assert refused(arrive(gate)[0]) == (503, "draining", True)
    gate.leave(first, 1.0)
    assert told.decisions == [None]


def test_the_models_may_be_listed_while_all_is_full() -> None:
    """Who asks is known without a place being taken."""
    gate = gate_of(ApiKey(name="a", key=SECRET))
    arrive(gate, SHOWN)
    key = gate.identify(SHOWN)

    assert isinstance(key, ApiKey)
    assert key.name == "a"
    assert refused(gate.identify(None)) == (401, "invalid_api_key", False)
    assert gate_of().identify(None) is None
