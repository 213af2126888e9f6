"""Two engines of each role and a router before them, real but for the models."""

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.integration.offering_engine import (
    OFFER,
    Behaviour,
    Handler,
    OfferingEngine,
    decode,
    offer,
    offering_engine,
)
from tests.integration.routers import Announced, router, wait_for, workers
from tests.waiting import HANG_S

TIMEOUT_S = 60.0
PROMPT = "word " * 200
PATH = "/v1/completions"
SETTINGS = {
    "prefill_timeout_s": HANG_S,
    "decode_timeout_s": HANG_S,
    "transport": "nixl",
    "min_tokens": 64,
}
HASTY: dict[str, Any] = {"prefill_timeout_s": 2.5, "decode_timeout_s": 2.5}
"""For engines that freeze: they are waited for, the others have to answer within it."""
# Scripts break one response after the other: engines are to be asked all the same.
PATIENT = {
    "health": {"interval_s": 0.2, "pause_s": 0.2, "timeout_s": HANG_S, "failures_max": 1000},
    "limits": {"retry_burst": 1000},
    "relay": {"upstream_idle_s": 0.3},
}


@dataclass
class Fleet:
    """Two engines of each role, and a router before them."""

    prefills: list[OfferingEngine]
    decodes: list[OfferingEngine]
    process: Announced

    @property
    def url(self) -> str:
        return str(self.process.ready["url"])

    @property
    def engines(self) -> list[OfferingEngine]:
        return [*self.prefills, *self.decodes]

    def told(self) -> dict[str, Any]:
        """What the router counted of hand-offs."""
        found: dict[str, Any] = workers(self.process)["handoff"]
        return found

    def settled(self, outcome: str, before: dict[str, Any]) -> None:
        """Wait until nothing is in flight, and one more hand-off ended so."""

        def is_so(told: dict[str, Any]) -> bool:
            counted = told["handoff"]["outcomes"][outcome] - before["outcomes"][outcome]
            return counted == 1 and not any(each["in_flight"] for each in told["workers"])

        wait_for(self.process, is_so)


@contextlib.contextmanager
def fleet(*, is_probed: bool = True, **handoff: Any) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        prefills = [stack.enter_context(offering_engine(offer(OFFER))) for _ in range(2)]
        decodes = [stack.enter_context(offering_engine(decode)) for _ in range(2)]
        engines = [{"url": each.url, "role": "prefill"} for each in prefills]
        engines += [{"url": each.url, "role": "decode"} for each in decodes]
        settings = {**PATIENT, "engines": engines, "handoff": {**SETTINGS, **handoff}}
        if not is_probed:
            settings["health"] = {"interval_s": 3600.0, "pause_s": 3600.0}
        process = stack.enter_context(
            router([each.url for each in (*prefills, *decodes)], settings)
        )
        yield Fleet(prefills, decodes, process)


def asked(found: Fleet, body: bytes | dict[str, Any], path: str = PATH, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:
        return client.post(found.url + path, content=content, headers=headers)


def question(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": PROMPT, "max_tokens": 50, **more}


def note_of(answer: httpx.Response) -> str:
    return answer.headers["x-kvkeep-route"].split("; ")[-1]


def first_of_all(engines: list[OfferingEngine], behaviour: Behaviour) -> None:
    """Whichever engine is asked first does this, the others do as ever."""
    lock, is_done = threading.Lock(), [False]

    def once(handler: Handler, body: dict[str, Any]) -> None:
        with lock:
            is_first, is_done[0] = not is_done[0], True
        (behaviour if is_first else handler.server.behaviour)(handler, body)

    for engine in engines:
        engine.scripts.append(once)


def bodies_of(engines: list[OfferingEngine]) -> list[dict[str, Any]]:
    return [json.loads(body) for engine in engines for body in engine.bodies]


def is_one_set(events: Iterable[threading.Event]) -> bool:
    """Whether one of them is set before it would have to be called hung."""
    watched = list(events)
    return any(event.wait(0.05) for _ in range(round(HANG_S / 0.05)) for event in watched)
