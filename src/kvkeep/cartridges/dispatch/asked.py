"""What a request says by which it could get a cartridge.

vLLM hands a connector ``sampling_params.extra_args``: what the request has as ``vllm_xargs``, and
under ``kv_transfer_params`` what it has under that name. A request that has not reached an engine
yet is a JSON object with both; OpenAI's Python client takes what it is given as ``extra_body``
apart, and people who write JSON by hand copy that word, so it is understood as well.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from kvkeep.model.errors import InputError

PARAMS: Final = "kv_transfer_params"
XARGS: Final = "vllm_xargs"
EXTRA_BODY: Final = "extra_body"
VALUE_CHARS_MAX: Final = 512


def no_header(name: str) -> str | None:
    """Of a request that came without headers: a connector sees none."""
    return None


class Asked:
    """What one request says by name; nothing of it is changed."""

    __slots__ = ("_places", "header")

    def __init__(
        self,
        places: Sequence[Mapping[str, Any]],
        header: Callable[[str], str | None] = no_header,
    ) -> None:
        """Keep where to look.

        Args:
            places: Where names stand; the first that has one counts.
            header: The value of a header by its lower-case name, None if there is none.
        """
        self._places, self.header = places, header

    def find(self, name: str) -> str | None:
        """What the request says under a name; null is as good as nothing.

        Raises:
            InputError: That is no name: empty, too long, or more than one value.
        """
        for place in self._places:
            value = place.get(name)
            if value is not None:
                return checked(name, value)
        return None


def checked(name: str, value: object) -> str:
    """A value as a name; whole numbers are taken as they are written.

    Raises:
        InputError: It is none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"{name} must be one text: write it as {name!r}: 'NAME', or leave it out")
    if not value:
        raise InputError(f"{name} is empty: name what is meant, or leave it out")
    if len(value) > VALUE_CHARS_MAX:
        raise InputError(f"{name} has {len(value)} letters: at most {VALUE_CHARS_MAX} are taken")
    return value


def of_extra_args(extra_args: object) -> Asked:
    """What a connector sees of a request; anything but a mapping says nothing."""
    if not isinstance(extra_args, Mapping):
        return Asked(())
    return Asked(_with_params(extra_args))


def of_body(body: Mapping[str, Any], header: Callable[[str], str | None] = no_header) -> Asked:
    """What a request's JSON says; ``extra_body`` comes after the top level."""
    places: list[Mapping[str, Any]] = []
    for level in (body, body.get(EXTRA_BODY)):
        if isinstance(level, Mapping):
            xargs = level.get(XARGS)
            if isinstance(xargs, Mapping):
                places.append(xargs)
            places += _with_params(level)[1:]
    return Asked(places, header)


def _with_params(level: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    params = level.get(PARAMS)
    return [level, params] if isinstance(params, Mapping) else [level]
