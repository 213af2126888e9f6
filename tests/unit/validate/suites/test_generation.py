"""Generation: what a right server does passes, and each thing it may do wrong is found."""

from typing import Any

from kvkeep.testing.fake_engine import FakeEngine, Reply
from kvkeep.testing.fake_kv import Faults
from kvkeep.validate.suites.generation import UNKNOWN_MODEL, run
from tests.unit.validate.conftest import MakeContext


class Changed(FakeEngine):
    """An engine whose replies to completions are changed."""

    def __init__(self, change: Any, **more: Any) -> None:
        super().__init__(**more)
        self.change = change

    def handle(self, method: str, path: str, body: bytes = b"") -> Reply:
        reply = super().handle(method, path, body)
        if "completions" in path:
            pieces = [(wait_s, self.change(piece)) for wait_s, piece in reply.pieces]
            return Reply(reply.status, reply.content_type, pieces)
        return reply


def broken(report: Any) -> set[str]:
    return {check.name for check in report.checks if check.ok is False}


async def test_a_right_server_passes(make_context: MakeContext) -> None:
    """All forms, three at once, greedy, clear errors."""
    (report,) = await run(await make_context(FakeEngine()))

    assert (report.outcome, broken(report)) == ("passed", set())
    assert report.numbers["tokens_per_s"] > 0


async def test_streams_without_an_end_are_found(make_context: MakeContext) -> None:
    """Streams that break off fail the forms and the three at once."""
    fake = FakeEngine()
    context = await make_context(fake)
    fake.faults = Faults(cut_every=1)

    (report,) = await run(context)

    assert {"every form is whole", "3 at once"} <= broken(report)


async def test_a_server_that_takes_any_model_fails(make_context: MakeContext) -> None:
    """An answer to a model that is not there is found."""

    class Careless(FakeEngine):
        def handle(self, method: str, path: str, body: bytes = b"") -> Reply:
            known = body.replace(UNKNOWN_MODEL.encode(), self.model.encode())
            return super().handle(method, path, known)

    (report,) = await run(await make_context(Careless()))

    assert broken(report) == {"unknown model is refused"}


async def test_sampling_that_is_not_greedy_is_found(make_context: MakeContext) -> None:
    """A token beside a likelier alternative was not taken at temperature 0."""
    fake = Changed(lambda piece: piece.replace(b'"logprob": -0.', b'"logprob": -5.', 1))

    (report,) = await run(await make_context(fake))

    assert "temperature 0 is greedy" in broken(report)
