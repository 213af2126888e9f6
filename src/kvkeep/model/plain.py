"""Values as a file of settings gives them: small, flat and plain, whatever the file says.

A few lines of YAML can name one list a thousand million times, hold themselves, or nest without
end. Whoever walks, prints or converts such values pays for all of it.
"""

from collections.abc import Iterator
from typing import Any

from kvkeep.model.errors import InputError

DEPTH_MAX = 32
NODES_MAX = 20_000
"""Values of all kinds, each counted as often as it is named."""
TEXT_MAX = 4 << 20
"""Characters of all texts, counted likewise."""
INT_BITS_MAX = 64


def check_plain(values: object, source: str) -> None:
    """Refuse values that no settings need.

    Raises:
        InputError: They nest too deeply, are too many or too long, or hold a huge number.
    """
    num_nodes = num_chars = 0
    open_levels: list[Iterator[Any]] = [iter((values,))]
    while open_levels:
        for value in open_levels[-1]:
            num_nodes += 1
            if isinstance(value, str | bytes):
                num_chars += len(value)
            if isinstance(value, int) and value.bit_length() > INT_BITS_MAX:
                raise InputError(
                    f"{source} holds a number of more than {INT_BITS_MAX} bits: mend it"
                )
            if num_nodes > NODES_MAX or num_chars > TEXT_MAX:
                raise InputError(f"{source} holds more than settings need: leave out what repeats")
            if isinstance(value, dict | list | tuple | set | frozenset):
                open_levels.append(_inside(value))
                break
        else:
            open_levels.pop()
        if len(open_levels) > DEPTH_MAX + 1:
            raise InputError(
                f"{source} is nested too deep, more than {DEPTH_MAX} levels: make it flat"
            )


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return (part for pair in value.items() for part in pair)
    return iter(value)
