"""What is believed of a tier behind a network, and when that is doubted.

A server may come back empty without one call having failed: then what the daemon believes it to
have would never be written to it again. So one believed key is asked for now and then, and when it
is missing, or when a call failed, everything believed is dropped and the pool's blocks are asked
for anew.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvkeep.model.ids import BlockKey

KNOWN_MAX = 1 << 18
"""Keys remembered of a tier that is asked over a network."""
STOCK_AGAIN_S = 30.0
"""From one stock to the next at least: a server that evicts by itself misses something all the
time, and one that flaps must not be asked for the whole pool each time."""
LOOK_S = 5.0
"""Until a tier is asked for a believed key again, while all is well ..."""
LOOK_AGAIN_S = 0.5
"""... and while it has not answered since something was in doubt."""


class KnownKeys:
    """Pure; the event loop's thread calls."""

    def __init__(self) -> None:
        self._known: OrderedDict[BlockKey, None] = OrderedDict()
        """Keys that were there when last looked; the latest last."""
        self._latest: BlockKey | None = None
        self._is_doubted = self._has_answered = False
        self._stock_at_s = 0.0
        self._is_taking_stock = False

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._known

    def keys(self) -> list[BlockKey]:
        """All of them."""
        return list(self._known)

    @property
    def sample(self) -> BlockKey | None:
        """A key to ask for: the latest that is believed, else the latest one heard of."""
        return next(reversed(self._known)) if self._known else self._latest

    def mentioned(self, key: BlockKey) -> None:
        """The tier is asked for it."""
        self._latest = key

    def learn(self, keys: Sequence[BlockKey], are_there: Sequence[bool]) -> None:
        """These were kept or deleted just now."""
        for key, is_there in zip(keys, are_there, strict=True):
            self._known.pop(key, None)
            if is_there:
                self._known[key] = None
            self._latest = key
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    def found(self, keys: Sequence[BlockKey], are_there: Sequence[bool], now_s: float) -> None:
        """The tier was asked for these: if a believed one is missing, the others are doubted."""
        is_wrong = any(
            not is_there and key in self._known
            for key, is_there in zip(keys, are_there, strict=True)
        )
        if is_wrong and now_s >= self._stock_at_s:
            self.doubt()
            self._has_answered = True
        self.learn(keys, are_there)

    def doubt(self) -> None:
        """Whatever was there may be gone: nothing is believed until the tier is asked again."""
        self._known.clear()
        self._is_doubted, self._has_answered = True, False

    def answered(self) -> None:
        """A call went well."""
        self._has_answered = True

    @property
    def look_again_s(self) -> float:
        """How long after an answer the tier is to be asked for a key."""
        return LOOK_AGAIN_S if self._is_doubted and not self._has_answered else LOOK_S

    def wants_stock(self, now_s: float) -> bool:
        """Whether the tier is back, and it is time to ask it for the blocks of the pool."""
        is_due = self._is_doubted and self._has_answered and now_s >= self._stock_at_s
        return is_due and not self._is_taking_stock

    def stock_begun(self, now_s: float) -> None:
        """It is asked for them; ``stock_ended`` follows."""
        self._is_doubted, self._is_taking_stock = False, True
        self._stock_at_s = now_s + STOCK_AGAIN_S

    def stock_ended(self) -> None:
        """It has been asked for all of them."""
        self._is_taking_stock = False
