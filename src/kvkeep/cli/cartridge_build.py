"""``kvkeep cartridge build``: a text's KV, computed by transformers."""

from pathlib import Path
from typing import Any

import click

from kvkeep.cli.cartridge_making import Description, authoring, computing, describing
from kvkeep.stack.models import check_model
from kvkeep.stack.progress import Progress

ROLES = ("none", "system", "user")


@click.command()
@click.argument("text_path", metavar="TEXT", type=click.Path(path_type=Path))
@computing
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="none",
    show_default=True,
    help="Whose message of a chat the text begins; none: a prompt without chat.",
)
@describing
def build(text_path: Path, model: str, **told: Any) -> None:
    """Compute the KV of the text in the file TEXT, and register it.

    Prompts that begin with this text are then served without computing it. With --role
    that is a chat whose first message begins with it.
    """
    described = Description.of(told, text_path.name)
    check_model(model)
    text = authoring("texts").read_text(text_path)
    with Progress(quiet=described.as_json).task(f"cartridge {described.cartridge_id}") as task:
        task.say(f"computing with {model}")
        built = authoring("build").build(
            text, model, role=told["role"], device=told["device"], dtype=told["dtype"]
        )
        entry = described.register(
            built, method="prefill", model=model, block_tokens=told["block_tokens"]
        )
    described.say(entry, "built")
