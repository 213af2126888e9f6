"""From a stack file, the environment and flags to one checked `StackSpec`.

The first of these that names a value decides it: flag, environment, stack file, default.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvkeep.daemon.settings import ENVIRONMENT_PREFIX, DaemonSettings
from kvkeep.model.errors import InputError
from kvkeep.model.plain import check_plain
from kvkeep.model.settings.wording import mend_of
from kvkeep.model.sizes import parse_bytes
from kvkeep.router.settings import ENVIRONMENT_PREFIX as ROUTER_PREFIX
from kvkeep.stack.routing.spec import RouterSpec, environment_fields
from kvkeep.stack.servers.named import ServerSpec
from kvkeep.stack.spec import DaemonSpec, EngineSpec, StackSpec, check_spec, make_exact

STACK_FILE_BYTES_MAX = 1 << 20
ENVIRONMENT: Mapping[str, str] = {
    "KVBM_MODEL_ID": "model",
    "KVBM_SERVER_PORT": "engines.0.port",
    "KVBM_SERVER_START_TIMEOUT": "start_timeout_s",
    "KVBM_CPU_BLOCKS": "daemon.pool_blocks",
    "KVBM_GPU_BLOCKS": "engines.*.num_gpu_blocks_override",
}
"""Field by environment variable; the daemon's own ``KVKEEP_`` variables, and the router's where the
file has one, are understood as well."""

Values = dict[str, Any]
_NAMES_ARE_TEXT = "YAML reads yes, no, on, off and numbers as values: quote what is meant as text"
_TOO_DEEP = "is nested too deep: no field needs more than a few levels"


def load_spec(
    path: Path | str,
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> StackSpec:
    """Read a stack file and settle every value.

    Args:
        path: YAML file.
        overrides: What flags say, as ``field=value`` texts or by field; a field is a path such as
            ``daemon.pool_bytes`` or ``engines.0.port``, where an engine's name and ``*`` (all)
            do as well as its number. ``None`` values count as not given.
        environment: ``os.environ`` if None.

    Raises:
        InputError: One sentence that names the field and the mend; nothing was changed.
    """
    path = Path(path)
    return make_spec(_read(path), overrides, environment=environment, default_name=_name_from(path))


def make_spec(
    values: Values,
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    environment: Mapping[str, str] | None = None,
    default_name: str = "default",
) -> StackSpec:
    """Settle every value of a stack that is given as plain values; see `load_spec`."""
    values = _plain(values, default_name)
    values.setdefault("name", default_name)
    if "router" in values and values["router"] is None:
        values["router"] = {}  # a section of which nothing is said
    _apply_environment(values, os.environ if environment is None else environment)
    for field, value in _pairs(overrides):
        _set(values, field, value)
    _parse_sizes(values)
    try:
        spec = msgspec.convert(values, StackSpec, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(_sentence(str(error), values)) from error
    spec = make_exact(spec)
    check_spec(spec)
    return spec


def _read(path: Path) -> Values:
    try:
        if path.stat().st_size > STACK_FILE_BYTES_MAX:
            raise InputError(f"{path} is larger than {STACK_FILE_BYTES_MAX} bytes: no stack file.")
        values = msgspec.yaml.decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}; name a stack file.") from error
    except RecursionError as error:
        raise InputError(f"{path} {_TOO_DEEP}.") from error
    except (msgspec.DecodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not YAML: {reason}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a mapping: write fields such as `model: smollm2`.")
    check_plain(values, str(path))
    return _plain(values, str(path))


def _plain(values: Values, source: str) -> Values:
    """A copy of nothing but texts, numbers, lists and mappings, with text as every top key."""
    for key in values:
        if not isinstance(key, str):
            raise InputError(f"{source}: {key!r} is not the name of a field; {_NAMES_ARE_TEXT}.")
    try:
        return msgspec.convert(msgspec.to_builtins(values), Values)
    except RecursionError as error:
        raise InputError(f"{source} {_TOO_DEEP}.") from error


def _name_from(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "default"


def _apply_environment(values: Values, environment: Mapping[str, str]) -> None:
    for variable, field in ENVIRONMENT.items():
        text = environment.get(variable, "").strip()
        if not text:
            continue
        if "," in text:
            raise InputError(f"{variable} = {text}: a stack takes one value, not a list.")
        _set(values, field, text)
    for setting in DaemonSettings.__struct_fields__:
        text = environment.get(ENVIRONMENT_PREFIX + setting.upper(), "").strip()
        if text:
            place = "" if setting in DaemonSpec.__struct_fields__ else "settings."
            _set(values, f"daemon.{place}{setting}", text)
    if isinstance(values.get("router"), dict):
        for field, text in environment_fields(environment, ROUTER_PREFIX).items():
            _set(values, field, text)


def _pairs(overrides: Sequence[str] | Mapping[str, object]) -> list[tuple[str, object]]:
    if isinstance(overrides, Mapping):
        return [(field, value) for field, value in overrides.items() if value is not None]
    pairs: list[tuple[str, object]] = []
    for text in overrides:
        field, equals, raw = text.partition("=")
        if not equals or not field.strip():
            raise InputError(f"{text!r} sets nothing: write field=value, such as model=smollm2.")
        try:
            pairs.append((field.strip(), msgspec.yaml.decode(raw.encode()) if raw else ""))
        except msgspec.DecodeError as error:
            raise InputError(f"{text!r}: the value is not YAML.") from error
    return pairs


def _set(values: Values, field: str, value: object) -> None:
    """Set one field; mappings on the way are made, engines must be there."""
    first, *rest = field.split(".")
    if first == "engines" and rest:
        for engine in _chosen_engines(values, rest[0], field):
            if not (rest[-1] in EngineSpec.__struct_fields__ and engine.get("url")):
                _set_below(engine, rest[1:], field, value)
    else:
        _set_below(values, [first, *rest], field, value)
    # Said later and by another word, a size in blocks replaces one in bytes, and the reverse.
    daemon = values.get("daemon")
    if isinstance(daemon, dict) and field == "daemon.pool_bytes":
        daemon.pop("pool_blocks", None)


def _set_below(values: Values, parts: Sequence[str], field: str, value: object) -> None:
    if not parts:
        raise InputError(f"{field}: name a field of the engine too, such as {field}.port.")
    for part in parts[:-1]:
        below = values.setdefault(part, {})
        if not isinstance(below, dict):
            raise InputError(f"{field}: {part} has no fields.")
        values = below
    values[parts[-1]] = value


def _chosen_engines(values: Values, which: str, field: str) -> list[Values]:
    engines = values.get("engines")
    if not isinstance(engines, list) or not all(isinstance(engine, dict) for engine in engines):
        return []  # the types will be found wrong, with a sentence of their own
    if which == "*":
        return engines
    if which.isdigit() and int(which) < len(engines):
        return [engines[int(which)]]
    found = [engine for engine in engines if engine.get("name") == which]
    if not found:
        raise InputError(f"{field}: there is no engine {which} in the stack file.")
    return found


def _parse_sizes(values: Values) -> None:
    daemon, engines = values.get("daemon"), values.get("engines")
    places: list[tuple[str, object, str]] = [("daemon", daemon, "pool_bytes")]
    if isinstance(engines, list):
        places += [
            (f"engines[{idx}]", engine, "kv_cache_bytes") for idx, engine in enumerate(engines)
        ]
    for where, mapping, field in places:
        if isinstance(mapping, dict) and isinstance(mapping.get(field), str):
            try:
                mapping[field] = parse_bytes(mapping[field])
            except InputError as error:
                raise InputError(f"{where}.{field}: {error}.") from error


def _sentence(text: str, values: Values) -> str:
    """Turn msgspec's complaint into a sentence that names the field and the mend."""
    what, _, path = text.partition(" - at `$")
    path = path.rstrip("`").removeprefix(".")
    if key_of := re.search(r"at `key` in `\$\.?(.*)`", text):
        return f"{key_of[1]}: a field's name must be text; {_NAMES_ARE_TEXT}."
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown:
        return _unknown_field(path, unknown[1])
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if missing:
        return f"{_join(path, missing[1])}: it is missing; write it."
    if path.endswith("name") and "regex" in what:
        what = "write letters, digits, dots, dashes and underscores, at most 63"
    found = _at(values, path)
    shown = "" if found is None or isinstance(found, dict | list) else f" = {found}"
    mend = mend_of(what, StackSpec, path) or what[0].lower() + what[1:]
    return f"{path or 'the stack file'}{shown}: {mend}."


def _unknown_field(path: str, name: str) -> str:
    kinds: dict[str, type[msgspec.Struct]] = {
        "daemon": DaemonSpec,
        "router": RouterSpec,
        "servers": ServerSpec,
        "": StackSpec,
    }
    kind = kinds.get(path.partition("[")[0], EngineSpec)
    known = kind.__struct_fields__
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it may be {', '.join(known)}."
    return f"{_join(path, name)}: there is no such field; {hint}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _at(values: object, path: str) -> object:
    """The raw value at a path such as ``engines[0].port``; None where there is none."""
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return values
