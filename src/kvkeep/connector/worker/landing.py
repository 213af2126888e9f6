"""A load that was begun, and how a worker waits for it."""

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Landing(Protocol):
    """Blocks on their way from the pool to the engine."""

    @property
    def seconds(self) -> float | None:
        """What the copies took, after ``wait``; None: ``begin_load`` waited for them."""
        ...

    def wait_for_layer(self, layer: int) -> None:
        """Have the engine's work from here on wait for a layer; the caller does not wait."""
        ...

    def wait(self) -> npt.NDArray[np.bool_]:
        """Wait until nothing is on its way any more.

        Returns:
            bool ``[num_blocks]``: whether every page of the block landed with its digest.
        """
        ...


class Landed:
    """A load that was over when it began to be waited for."""

    seconds = None

    def __init__(self, landed: npt.NDArray[np.bool_]) -> None:
        self._landed = landed

    def wait_for_layer(self, layer: int) -> None:
        """Nothing to wait for."""

    def wait(self) -> npt.NDArray[np.bool_]:
        """See Landing."""
        return self._landed
