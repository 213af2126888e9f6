"""The table of docs/check.md: every environment name with its defaults."""

from dataclasses import fields
from typing import Any

from kvkeep.validate.settings.resolution import resolve
from kvkeep.validate.settings.values import DOCUMENTS, CheckSettings, variables_of


def environment_table() -> str:
    """Every variable of every document, with its default here and the document's own."""
    metadata = {f.name: f.metadata for f in fields(CheckSettings)}
    parts = []
    for document in DOCUMENTS:
        variables = variables_of(document)
        if not variables:
            continue
        own = CheckSettings()
        reference = resolve({}, {}, profile="reference", documents=(document,))
        lines = [
            f"Suites of the document *{document.value}*:",
            "",
            "| variable | local default | `--profile reference` |",
            "|---|---|---|",
        ]
        for variable, name in variables.items():
            unset = metadata[name]["unset"]
            local, theirs = (_shown(getattr(each, name), unset) for each in (own, reference))
            lines.append(f"| `{variable}` | {local} | {theirs} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _shown(value: Any, unset: str) -> str:
    if value is None:
        return unset
    if isinstance(value, bool):
        return "set" if value else "unset"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"
