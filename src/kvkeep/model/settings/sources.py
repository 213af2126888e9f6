"""Settings of a program, from one YAML file, the environment and flags.

Precedence: flag, environment (a prefix and the field's name), file, default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from kvkeep.model.errors import InputError
from kvkeep.model.plain import check_plain
from kvkeep.model.settings.wording import wording_of

FILE_BYTES_MAX: Final = 1 << 20
"""Of a settings file; a mistaken path must not fill the memory."""

Settings = TypeVar("Settings", bound=msgspec.Struct)
Values = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Whose settings they are, and what a user calls them."""

    name: str
    """As in ``a setting of the daemon``."""
    prefix: str
    """Of its variables in the environment."""
    not_its_own: tuple[str, ...] = ()
    """Longer prefixes, of programs that check their variables themselves: one environment may serve
    several."""
    example: str
    """A line of its file."""


def load_settings(
    kind: type[Settings],
    program: Program,
    file: Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, object],
    prepare: Callable[[Values], None] = lambda values: None,
) -> Settings:
    """Combine what a user said; flags win, then the environment, then the file.

    Args:
        kind: Of the settings; checks what only it can in ``__post_init__``.
        program: Whose they are.
        file: YAML mapping of field names, or None.
        environment: ``os.environ``; what begins with the program's prefix must be one of its own.
        flags: Only those that were given.
        prepare: Rewrites in place what people write more shortly; sees whatever they wrote.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    values = {} if file is None else read_mapping(file, program.example)
    fields = kind.__struct_fields__
    for variable, text in environment.items():
        if variable.startswith(program.prefix) and not variable.startswith(program.not_its_own):
            field = variable.removeprefix(program.prefix).lower()
            if field not in fields:
                raise InputError(
                    f"the environment's {variable} is not a setting of the {program.name}: "
                    f"unset it, or choose from {', '.join(sorted(fields))}"
                )
            values[field] = text
    values.update(flags)
    prepare(values)
    unknown = sorted(str(name) for name in values if name not in fields)
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is not a setting of the {program.name}: "
            f"choose from {', '.join(sorted(fields))}"
        )
    return checked(kind, values)


def checked(kind: type[Settings], values: Values) -> Settings:
    """Make settings of plain values, texts for numbers among them.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(wording_of(str(error), values, kind)) from error


def read_mapping(file: Path, example: str) -> Values:
    """Read a YAML file of settings.

    Args:
        file: Where.
        example: A line that it may hold.

    Raises:
        InputError: It can't be read, is too large, or is no mapping.
    """
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is not a file: name a YAML file of settings")
        with file.open("rb") as opened:
            text = opened.read(FILE_BYTES_MAX + 1)
        if len(text) > FILE_BYTES_MAX:
            raise InputError(f"{file} is larger than {FILE_BYTES_MAX} bytes: settings fit in less")
        values = msgspec.yaml.decode(text)
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{file} is nested too deeply: make it flat") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a mapping of settings: write lines such as {example!r}")
    check_plain(values, str(file))
    return values
