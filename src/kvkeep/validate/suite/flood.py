"""Other requests beside those of a suite: they push the suite's blocks out of the engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvkeep.validate.load import Endpoint, Sampling
from kvkeep.validate.suite.base import Context
from kvkeep.validate.suite.sizes import Cutter

FLOOD_TOKENS = 1000
FLOOD_IN_FLIGHT = 2
FLOOD_DOCUMENTS = 64
FLOOD_ANSWER = Sampling(max_tokens=1)


class Flood:
    """Documents that nobody asked before, one after another, while it is open.

    Each request has a salt of its own: none finds KV, and none is found by the suite's prompts.
    """

    def __init__(self, context: Context, cutter: Cutter, endpoint: Endpoint) -> None:
        """Prepare; nothing is sent."""
        most = context.subject.capabilities.max_model_len or FLOOD_TOKENS * 2
        made = cutter.documents(
            FLOOD_DOCUMENTS, min(FLOOD_TOKENS, most // 2), context.settings.seed + 7
        )
        self._texts = [document.prompt().text for document in made]
        self._endpoint, self._new_salt = endpoint, context.new_run_id
        self.num_requests = 0
        self.num_tokens = 0
        """Prompt tokens of the requests that were answered."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Flood until the block ends; requests under way are then broken off."""
        tasks = [asyncio.create_task(self._ask_on(idx)) for idx in range(FLOOD_IN_FLIGHT)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_on(self, first_idx: int) -> None:
        idx = first_idx
        while True:
            text = self._texts[idx % len(self._texts)]
            answer = await self._endpoint.chat(text, FLOOD_ANSWER, salt=self._new_salt())
            self.num_requests += answer.error is None
            self.num_tokens += answer.prompt_tokens or 0
            idx += FLOOD_IN_FLIGHT
            # An engine that refuses at once must not keep the suite itself from asking.
            await asyncio.sleep(0)
