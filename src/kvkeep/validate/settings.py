"""What a determinism run does: values from flags, environment, stack file and defaults.

The first of these that names a value decides it: flag, environment, stack file, profile. The
environment's names are those of the suite this one implements (docs/check.md lists them).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kvkeep.model.errors import InputError

REFERENCE_TEXT_URL = "https://ocw.mit.edu/ans7870/6/6.006/s08/lecturenotes/files/t8.shakespeare.txt"
CONCURRENT_MAX_TOKENS = (10,)
"""Answer length of the concurrent suite where nothing names one; the sequential one has 48."""


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """One value for everything; ``None`` leaves it to the stack."""

    model_id: str | None = field(default=None, metadata={"env": "KVBM_MODEL_ID"})
    """Model of an engine that the check starts; a running one is asked what it serves."""
    server_port: int | None = field(
        default=None, metadata={"env": "KVBM_SERVER_PORT", "max": 65535}
    )
    server_start_timeout_s: float = field(
        default=300.0, metadata={"env": "KVBM_SERVER_START_TIMEOUT"}
    )
    cpu_blocks: int | None = field(default=None, metadata={"env": "KVBM_CPU_BLOCKS"})
    """Blocks of the host pool."""
    max_tokens: tuple[int, ...] = field(default=(48,), metadata={"env": "KVBM_MAX_TOKENS"})
    """Answer lengths, each of them one run."""
    seed: int = field(default=42, metadata={"env": "KVBM_SEED", "min": 0})
    max_iterations: int = field(default=20, metadata={"env": "KVBM_MAX_ITERATIONS"})
    word_count: int = field(default=200, metadata={"env": "KVBM_WORD_COUNT", "min": 8})
    """Words of a window."""
    control_interval: int = field(default=10, metadata={"env": "KVBM_CONTROL_INTERVAL"})
    shakespeare_interval: int = field(default=1, metadata={"env": "KVBM_SHAKESPEARE_INTERVAL"})
    random_interval: int = field(default=7, metadata={"env": "KVBM_RANDOM_INTERVAL"})
    http_timeout_s: float = field(default=30.0, metadata={"env": "KVBM_HTTP_TIMEOUT"})
    shakespeare_url: str | None = field(
        default=None, metadata={"env": "KVBM_SHAKESPEARE_URL", "unset": "the shipped plays"}
    )
    """Where the long text comes from; None takes the shipped plays."""
    concurrent_requests: tuple[int, ...] = field(
        default=(3,), metadata={"env": "KVBM_CONCURRENT_REQUESTS"}
    )
    ifeval_prompts: tuple[int, ...] = field(default=(120,), metadata={"env": "KVBM_IFEVAL_PROMPTS"})

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


REFERENCE_PROFILE: Mapping[str, Any] = {
    "model_id": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "server_port": 8000,
    "cpu_blocks": 10_000,
    "max_iterations": 500,
    "shakespeare_url": REFERENCE_TEXT_URL,
}
"""Where the suite's own defaults differ from local ones; the rest is equal."""
PROFILES: Mapping[str, Mapping[str, Any]] = {"local": {}, "reference": REFERENCE_PROFILE}
ENVIRONMENT: Mapping[str, str] = {
    f.metadata["env"]: f.name for f in fields(CheckSettings) if "env" in f.metadata
}
"""Field by the name of its environment variable."""


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    stack: Mapping[str, Any] | None = None,
    profile: str = "local",
) -> CheckSettings:
    """Settle every value.

    Args:
        flags: Values by field; None stands for a flag that was not given.
        environ: The process's environment; an empty variable counts as unset.
        stack: The ``check`` section of the stack file.
        profile: A key of `PROFILES`.

    Raises:
        InputError: A value is not what its field takes, or a field or profile does not exist.
    """
    if profile not in PROFILES:
        raise InputError(f"No profile {profile!r}: take one of {', '.join(PROFILES)}.")
    chosen: dict[str, Any] = dict(PROFILES[profile])
    known = {f.name: f for f in fields(CheckSettings)}
    for name, value in (stack or {}).items():
        if name not in known:
            raise InputError(
                f"The stack file's check section has no setting {name!r}; it takes "
                f"{', '.join(sorted(known))}."
            )
        chosen[name] = _parsed(name, value, f"check.{name} in the stack file")
    for variable, name in ENVIRONMENT.items():
        if environ.get(variable, "").strip():
            chosen[name] = _parsed(name, environ[variable], variable)
    for name, value in flags.items():
        if value is not None and value != ():
            chosen[name] = _parsed(name, value, f"--{name.removesuffix('_s').replace('_', '-')}")
    return CheckSettings(**chosen)


def environment_table() -> str:
    """The table of docs/check.md: every environment name with its two defaults."""
    lines = ["| variable | local default | `--profile reference` |", "|---|---|---|"]
    reference = resolve({}, {}, profile="reference")
    for variable, name in ENVIRONMENT.items():
        unset = CheckSettings.__dataclass_fields__[name].metadata.get("unset", "the stack's")
        local, theirs = (
            _shown(getattr(settings, name), unset) for settings in (CheckSettings(), reference)
        )
        lines.append(f"| `{variable}` | {local} | {theirs} |")
    return "\n".join(lines)


def _shown(value: Any, unset: str) -> str:
    if value is None:
        return unset
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


def is_set(name: str, flags: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Whether a person named this value, so that it must be kept as it is."""
    variable = next(v for v, n in ENVIRONMENT.items() if n == name)
    return flags.get(name) not in (None, ()) or bool(environ.get(variable, "").strip())


def _parsed(name: str, value: Any, source: str) -> Any:
    """Turn one raw value into its field's type, within its limits."""
    spec = next(f for f in fields(CheckSettings) if f.name == name)
    least, most = spec.metadata.get("min", 1), spec.metadata.get("max", 10**9)
    kind = str(spec.type)
    if kind.startswith("tuple"):
        numbers = tuple(_number(int, part, source, least, most) for part in _parts(value))
        if not numbers:
            raise InputError(f"{source} is an empty list: give numbers separated by commas.")
        return numbers
    if kind.startswith("str"):
        return str(value)
    convert: Callable[[Any], float] = float if spec.type is float else int
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
