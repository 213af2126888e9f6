"""Tables for docs/operations.md, made from what the daemon itself goes by."""

import ast
import inspect

import msgspec

from kvkeep.daemon.metrics import COUNTERS, GAUGES
from kvkeep.daemon.settings import ENVIRONMENT_PREFIX, DaemonSettings


def settings_table() -> str:
    """Every setting: field, environment, flag, default, meaning."""
    texts = field_texts(DaemonSettings)
    lines = ["| setting | environment | flag | default | meaning |", "|---|---|---|---|---|"]
    for field in msgspec.structs.fields(DaemonSettings):
        name = field.name
        lines.append(
            f"| `{name}` | `{ENVIRONMENT_PREFIX}{name.upper()}` | `--{name.replace('_', '-')}` | "
            f"{_readable(field.default)} | {texts[name]} |"
        )
    return "\n".join(lines)


def metrics_table() -> str:
    """Every counter and gauge, as Prometheus shows it."""
    lines = ["| metric | kind | meaning |", "|---|---|---|"]
    lines += [f"| `kvkeep_{name}_total` | counter | {text} |" for name, text in COUNTERS.items()]
    lines += [f"| `kvkeep_{name}` | gauge | {text} |" for name, text in GAUGES.items()]
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
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1 << 30 and value % (1 << 30) == 0:
        return f"{value >> 30}GiB"
    return "empty" if value == "" else str(value)
