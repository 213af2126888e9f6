"""Waiting for a state, never for a time: on an event loop, until something is so."""

import asyncio
from collections.abc import Awaitable, Callable

HANG_S = 60.0
"""What takes longer hangs: where there is much to do a process may stand still for seconds."""


async def until(
    is_so: Callable[[], bool | Awaitable[bool]],
    what: str = "what the test waits for",
    *,
    timeout_s: float = HANG_S,
    pause_s: float = 0.005,
    changed: asyncio.Event | None = None,
) -> None:
    """Look again and again until it is so.

    Args:
        is_so: Asked each time; may be a coroutine function.
        what: Said where it does not come.
        timeout_s: Longest wait.
        pause_s: Between two looks at what tells nobody when it changes.
        changed: Set by whatever moves; then it is looked at whenever that happens, and no more.

    Raises:
        AssertionError: It did not come in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while not await _answer(is_so):
                if changed is None:
                    await asyncio.sleep(pause_s)
                else:
                    await changed.wait()
                    changed.clear()
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


async def _answer(is_so: Callable[[], bool | Awaitable[bool]]) -> bool:
    found = is_so()
    return found if isinstance(found, bool) else await found
