"""Tables for docs/cartridges.md, made from the code."""

import msgspec

from kvkeep.cartridges.manifest import Manifest
from kvkeep.daemon.tables import field_texts


def manifest_table() -> str:
    """Every field of a manifest."""
    texts = field_texts(Manifest)
    lines = ["| field | meaning |", "|---|---|"]
    for field in msgspec.structs.fields(Manifest):
        lines.append(f"| `{field.name}` | {texts[field.name]} |")
    return "\n".join(lines)
