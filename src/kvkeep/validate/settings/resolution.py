"""Settles every value of a check: the first source that names it decides it.

In order: flag, environment, stack file, profile, scale. A suite hears the variables of its own
document only, because names such as ``MODEL`` and ``LIMIT`` mean something else elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

from kvkeep.model.errors import InputError
from kvkeep.validate.settings.profiles import PROFILES, SCALES, unnamed
from kvkeep.validate.settings.values import (
    DOCUMENTS,
    CheckSettings,
    Document,
    variables_of,
)


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    stack: Mapping[str, Any] | None = None,
    profile: str = "local",
    *,
    documents: Sequence[Document] = DOCUMENTS,
    scale: str = "small",
) -> CheckSettings:
    """Settle every value.

    Args:
        flags: Values by field; None stands for a flag that was not given.
        environ: The process's environment; an empty variable counts as unset.
        stack: The ``check`` section of the stack file.
        profile: One of `PROFILES`.
        documents: Whose variables are heard, and whose defaults the reference profile takes.
        scale: Of `SCALES`, where neither a flag nor the stack file names one; the reference
            profile is full.

    Raises:
        InputError: A value is not what its field takes, a field, profile or scale does not exist,
            or two variables name one value differently.
    """
    if profile not in PROFILES:
        raise InputError(f"No profile {profile!r}: take one of {', '.join(PROFILES)}.")
    known = {f.name: f for f in fields(CheckSettings)}
    named: dict[str, Any] = {}
    for name, value in (stack or {}).items():
        if name not in known:
            raise InputError(
                f"The stack file's check section has no setting {name!r}; it takes "
                f"{', '.join(sorted(known))}."
            )
        named[name] = _parsed(known[name], value, f"check.{name} in the stack file")
    for name, (variable, text) in heard(environ, documents).items():
        named[name] = _parsed(known[name], text, variable)
    for name, value in flags.items():
        if value is not None and value != ():
            flag = f"--{name.removesuffix('_s').replace('_', '-')}"
            named[name] = _parsed(known[name], value, flag)
    scale = named.get("scale", "full" if profile == "reference" else scale)
    if scale not in SCALES:
        raise InputError(f"No scale {scale!r}: take one of {', '.join(SCALES)}.")
    if "max_tokens" in named:
        named.setdefault("concurrent_max_tokens", named["max_tokens"])
    others = unnamed(profile, scale, tuple(documents), named.get("model_id"))
    return CheckSettings(**{**others, **named})


def heard(
    environ: Mapping[str, str], documents: Sequence[Document] = DOCUMENTS
) -> dict[str, tuple[str, str]]:
    """What the environment says: variable and text by field.

    Raises:
        InputError: Two variables name one value differently.
    """
    found: dict[str, tuple[str, str]] = {}
    for document in documents:
        for variable, name in variables_of(document).items():
            text = environ.get(variable, "").strip()
            if not text:
                continue
            before, earlier = found.setdefault(name, (variable, text))
            if earlier != text:
                raise InputError(
                    f"{before} = {earlier} and {variable} = {text} name the same setting: "
                    "unset one of them."
                )
    return found


def names_set(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    stack: Mapping[str, Any] | None = None,
    documents: Sequence[Document] = DOCUMENTS,
) -> frozenset[str]:
    """Settings that a person named, so that they must be kept as they are; as in `resolve`."""
    flagged = {name for name, value in flags.items() if value not in (None, ())}
    return frozenset(flagged | set(stack or ()) | heard(environ, documents).keys())


def _parsed(spec: Field[Any], value: Any, source: str) -> Any:
    """Turn one raw value into its field's type, within its limits."""
    least, most = spec.metadata["min"], spec.metadata["max"]
    kind = str(spec.type)
    if kind.startswith("<class '"):
        kind = kind.removeprefix("<class '").removesuffix("'>")
    if kind.startswith("tuple"):
        numbers = tuple(_number(int, part, source, least, most) for part in _parts(value))
        if not numbers:
            raise InputError(f"{source} is an empty list: give numbers separated by commas.")
        return numbers
    if kind.startswith("str"):
        return str(value)
    if kind == "bool":
        return str(value).strip().lower() not in ("", "0", "false", "no", "off")
    convert: Callable[[Any], float] = float if kind.startswith("float") else int
    parts = _parts(value)
    if len(parts) != 1:
        raise InputError(f"{source} takes one number, not {value!r}.")
    return _number(convert, parts[0], source, least, most)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part for part in (piece.strip() for piece in value.split(",")) if part]
    if isinstance(value, list | tuple):
        return [part for item in value for part in _parts(item)]
    return [value]


def _number(
    convert: Callable[[Any], float], raw: Any, source: str, least: float, most: float
) -> float:
    try:
        number = convert(raw)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source} takes a number, not {raw!r}.") from error
    if not least <= number <= most:
        raise InputError(f"{source} takes {least} to {most}, not {raw}.")
    return number
