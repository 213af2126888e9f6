"""Tables for docs/operations.md, made from what the daemon itself goes by."""

import ast
import inspect
from typing import get_args

import msgspec

from kvkeep.daemon.metrics import COUNTERS, GAUGES, TENANT_GAUGES
from kvkeep.daemon.sequences import figures
from kvkeep.daemon.sequences.settings import SequenceSettings
from kvkeep.daemon.settings import ENVIRONMENT_PREFIX, DaemonSettings
from kvkeep.daemon.tier_settings import AnyTierSettings, TierSettings

FILE_ONLY = frozenset({"quotas", "sequences", "tiers"})
"""Settings that fit neither a variable nor a flag."""


def settings_table() -> str:
    """Every setting: field, environment, flag, default, meaning."""
    texts = field_texts(DaemonSettings)
    lines = ["| setting | environment | flag | default | meaning |", "|---|---|---|---|---|"]
    for field in msgspec.structs.fields(DaemonSettings):
        name = field.name
        if name in FILE_ONLY:
            lines.append(f"| `{name}` | - | - | none | {texts[name]} |")
            continue
        lines.append(
            f"| `{name}` | `{ENVIRONMENT_PREFIX}{name.upper()}` | `--{name.replace('_', '-')}` | "
            f"{_readable(field.default)} | {texts[name]} |"
        )
    return "\n".join(lines)


def tiers_table() -> str:
    """What a tier can be told: the fields of each kind, and those that all kinds have."""
    lines = ["| kind | field | default | meaning |", "|---|---|---|---|"]
    shared = {field.name for field in msgspec.structs.fields(TierSettings)}
    kinds: list[type[TierSettings]] = [*get_args(AnyTierSettings), TierSettings]
    for kind in kinds:
        is_shared = kind is TierSettings
        texts = field_texts(kind)
        for field in msgspec.structs.fields(kind):
            if not is_shared and field.name in shared:
                continue
            label = "every kind" if is_shared else f"`{kind.__struct_config__.tag}`"
            text = texts.get(field.name, "")
            lines.append(f"| {label} | `{field.name}` | {_default(field)} | {text} |")
    return "\n".join(lines)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return "none"
    return "required" if field.default is msgspec.NODEFAULT else _readable(field.default)


def metrics_table() -> str:
    """Every counter and gauge, as Prometheus shows it."""
    lines = ["| metric | kind | meaning |", "|---|---|---|"]
    lines += [f"| `kvkeep_{name}_total` | counter | {text} |" for name, text in COUNTERS.items()]
    lines += [f"| `kvkeep_{name}` | gauge | {text} |" for name, text in GAUGES.items()]
    lines += [
        f"| `kvkeep_{name}{{tenant}}` | gauge | {text} |" for name, text in TENANT_GAUGES.items()
    ]
    return "\n".join(lines)


def sequence_settings_table() -> str:
    """The fields of the section ``sequences``."""
    texts = field_texts(SequenceSettings)
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(SequenceSettings):
        lines.append(f"| `{field.name}` | {_default(field)} | {texts[field.name]} |")
    return "\n".join(lines)


def sequence_metrics_table() -> str:
    """What is counted of sequences, where they are kept."""
    lines = ["| metric | kind | meaning |", "|---|---|---|"]
    for name, text in figures.COUNTERS.items():
        lines.append(f"| `kvkeep_{name}_total` | counter | {text} |")
    for name, text in figures.GAUGES.items():
        lines.append(f"| `kvkeep_{name}` | gauge | {text} |")
    return "\n".join(lines)


def field_texts(struct: type) -> dict[str, str]:
    """What stands below each field of a class, on one line."""
    (tree,) = ast.parse(inspect.getsource(struct)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            text = str(ast.literal_eval(below.value)).replace("``", "`")
            texts[field.target.id] = " ".join(text.split())
    return texts


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value >= 1 << 30 and value % (1 << 30) == 0:
        return f"{value >> 30}GiB"
    return "empty" if value == "" else str(value)
