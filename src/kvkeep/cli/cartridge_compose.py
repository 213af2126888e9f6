"""``kvkeep cartridge compose``: several cartridges as one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kvkeep.cartridges.checkpoint import SUFFIXES
from kvkeep.cartridges.file_format import read_cartridge
from kvkeep.cartridges.signing import load_public_key
from kvkeep.cli.cartridge import find_path
from kvkeep.cli.cartridge_making import Description, authoring, describing
from kvkeep.model.errors import InputError


@click.command()
@click.argument("targets", metavar="FILE|ID...", nargs=-1, required=True)
@click.option(
    "--model", default="", help="Where the model's config.json is; by default as they say."
)
@click.option(
    "--trusted-key",
    "trusted_keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Public key (PEM) of a maker; one of those given has to have signed each.",
)
@describing
def compose(targets: Sequence[str], model: str, trusted_keys: Sequence[Path], **told: Any) -> None:
    """Put cartridges of one model behind one another, and register the result.

    Keys move to their new positions. Each document attends to itself alone and not to
    those before it, so a composed cartridge goes before prompts and never in place of
    their text.
    """
    described = Description.of(told, " + ".join(Path(target).name for target in targets))
    trusted = [load_public_key(path) for path in trusted_keys]
    paths = [find_path(target, told["library"]) for target in targets]
    for path in paths:
        if path.suffix in SUFFIXES:
            raise InputError(
                f"{path} does not say whose KV it holds: register it, then name its id"
            )
    parts = [read_cartridge(path, trusted=trusted) for path in paths]
    built = authoring("compose").compose(parts, model)
    first = parts[0].head.manifest
    entry = described.register(
        built, method="composed", model=first.model, block_tokens=first.block_tokens
    )
    described.say(entry, "composed")
