"""Calls that may hang, beside the event loop: the daemon's end does not wait for them."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from kvkeep.model.errors import KvkeepError, UnavailableError

Answer = TypeVar("Answer")


async def on_own_thread(call: Callable[[], Answer], what: str) -> Answer:
    """Await a call on a thread made for it, which does not keep the process alive.

    Threads of a pool do: Python waits for each of them when it ends.

    Args:
        call: Goes on if whoever awaits it is cancelled.
        what: Name of the thread.

    Raises:
        KvkeepError: Whatever of that kind the call raised; UnavailableError after a defect in it.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    answers: list[Answer] = []
    errors: list[KvkeepError] = []

    def settle() -> None:
        if not ended.done():
            ended.set_result(None)

    def run() -> None:
        try:
            answers.append(call())
        except KvkeepError as error:
            errors.append(error)
        finally:
            # The loop may have ended before a late call did.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, name=f"kvkeep-{what}", daemon=True).start()
    await ended
    if answers:
        return answers[0]
    raise errors[0] if errors else UnavailableError(f"{what} has a defect: see the log")
