"""Tables for docs/stack-file.md, made from what a stack file is checked against."""

import msgspec

from kvkeep.daemon.tables import field_texts
from kvkeep.stack.precedence import ENVIRONMENT
from kvkeep.stack.routing.spec import RouterSpec
from kvkeep.stack.servers.named import ServerSpec
from kvkeep.stack.servers.started import StartedFields
from kvkeep.stack.spec import DaemonSpec, EngineSpec, StackSpec


def stack_fields() -> str:
    """Fields of the file itself."""
    return _fields_table(StackSpec)


def daemon_fields() -> str:
    """Fields of ``daemon``."""
    return _fields_table(DaemonSpec)


def engine_fields() -> str:
    """Fields of one of ``engines``."""
    return _fields_table(EngineSpec)


def router_fields() -> str:
    """Fields of ``router``."""
    return _fields_table(RouterSpec)


def server_fields() -> str:
    """Fields that an entry of ``daemon.tiers`` may have beside the tier's own."""
    return _fields_table(StartedFields)


def named_server_fields() -> str:
    """Fields of one of ``servers``."""
    return _fields_table(ServerSpec)


def environment_table() -> str:
    """Which environment variable sets which field."""
    lines = ["| variable | field |", "|---|---|"]
    lines += [f"| `{variable}` | `{field}` |" for variable, field in ENVIRONMENT.items()]
    return "\n".join(lines)


def _fields_table(struct: type[msgspec.Struct]) -> str:
    texts = field_texts(struct)
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(struct):
        text = texts[field.name].replace("|", "\\|")
        lines.append(f"| `{field.name}` | {_default(struct, field)} | {text} |")
    return "\n".join(lines)


def _default(struct: type, field: msgspec.structs.FieldInfo) -> str:
    """What counts where a file says nothing; `make_spec` names a stack after its file."""
    value = field.default
    if field.required:
        return "required" if struct is not StackSpec or field.name != "name" else "the file's name"
    if value is msgspec.NODEFAULT or isinstance(value, msgspec.Struct):
        return ""  # an empty mapping or list, or a section with defaults of its own
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value >= 1 << 30 and value % (1 << 30) == 0:
        return f"`{value >> 30}GiB`"
    if value in (None, ""):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
