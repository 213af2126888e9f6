"""Gates that a test opens itself, made of C's own semaphores: passing one needs no Python."""

import ctypes

from kvkeep.transfer.arrivals import Gate

_LIBC = ctypes.PyDLL(None)
"""Does not give up the interpreter's lock: nothing here blocks."""
_SEMAPHORE_BYTES = 32


def _address(function: object) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)  # type: ignore[arg-type]


class Door:
    """Stays closed until it is opened, once."""

    def __init__(self) -> None:
        self._semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        assert _LIBC.sem_init(self._semaphore, 0, 0) == 0

    def gate(self, end_layer: int) -> Gate:
        """A gate that this door keeps closed."""
        return Gate(_address(_LIBC.sem_wait), ctypes.addressof(self._semaphore), end_layer)

    def open(self) -> None:
        """Let the gate's thread pass."""
        assert _LIBC.sem_post(self._semaphore) == 0


def open_gate(end_layer: int) -> Gate:
    """A gate that nobody waits at: ``abs(0)``."""
    return Gate(_address(_LIBC.abs), 0, end_layer)


def failing_gate(end_layer: int, code: int = 7) -> Gate:
    """A gate that fails: ``abs(code)``."""
    return Gate(_address(_LIBC.abs), code, end_layer)
