"""What ``kvkeep cartridge build``, ``compose`` and ``train`` have in common."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from kvkeep.cartridges.manifest import Draft, Method
from kvkeep.cartridges.registry import Entry, Registry
from kvkeep.cartridges.signing import SigningKey
from kvkeep.cli.cartridge import facts_of_entry, library_folder, parse_label
from kvkeep.model.clock import wall_clock_s
from kvkeep.model.errors import InputError
from kvkeep.protocol.sequence_body import NAME

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")
BLOCK_TOKENS = 16
_NEEDED = ("torch", "transformers", "safetensors")
_Command = Callable[..., None]


def describing(command: _Command) -> _Command:
    """Add what every maker says of its cartridge."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON line."),
        click.option(
            "--library",
            type=click.Path(path_type=Path),
            help="Folder of the registry; by default this user's own.",
        ),
        click.option(
            "--sign", "key_path", type=click.Path(path_type=Path), help="Key to sign it with."
        ),
        click.option("--label", "labels", multiple=True, help="NAME=VALUE; may be repeated."),
        click.option("--source", help="What it was made from; by default the names of the files."),
        click.option("--id", "cartridge_id", required=True, help="What requests will call it."),
    ):
        command = option(command)
    return command


def computing(command: _Command) -> _Command:
    """Add which model computes a text's KV, where, and for which engines."""
    for option in (
        click.option(
            "--block-tokens",
            type=click.IntRange(1, 1 << 16),
            default=BLOCK_TOKENS,
            show_default=True,
            help="Tokens per block of the engines that will serve it.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="Data type of the KV; auto: as engines choose for the model.",
        ),
        click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True),
        click.option("--model", required=True, help="smollm2, a folder, or a Hugging Face id."),
    ):
        command = option(command)
    return command


def authoring(module: str) -> Any:
    """A module that needs torch, imported only by the commands that need it.

    Raises:
        InputError: torch or transformers is not installed.
    """
    try:
        return importlib.import_module(f"kvkeep.authoring.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        raise InputError(
            f"{error.name} is not installed, which computes KV: pip install kvkeep[vllm], or torch "
            "and transformers"
        ) from error


@dataclass(frozen=True)
class Description:
    """What a person says of a cartridge; made, and refused, before anything takes long."""

    cartridge_id: str
    source: str
    labels: dict[str, str]
    signing_key: SigningKey | None
    library: Path
    as_json: bool

    @staticmethod
    def of(told: Mapping[str, Any], source: str) -> "Description":
        """Out of the options of `describing`.

        Raises:
            InputError: The id, a label or the key can't be used.
        """
        cartridge_id = told["cartridge_id"]
        if not NAME.fullmatch(cartridge_id):
            raise InputError(
                f"{cartridge_id!r} can't be an id: take 1 to 256 letters, digits, '.', '_', ':', "
                "'@' and '-'"
            )
        return Description(
            cartridge_id=cartridge_id,
            source=told["source"] or source,
            labels=dict(parse_label(label) for label in told["labels"]),
            signing_key=SigningKey.load(told["key_path"]) if told["key_path"] else None,
            library=library_folder(told["library"]),
            as_json=told["as_json"],
        )

    def register(self, built: Any, *, method: Method, model: str, block_tokens: int) -> Entry:
        """Register what was made.

        Args:
            built: ``kvkeep.authoring.build.Built``.
            method: How it was made.
            model: Whose KV it is.
            block_tokens: Of the engines.
        """
        made_at = datetime.fromtimestamp(wall_clock_s(), UTC)
        draft = Draft(
            cartridge_id=self.cartridge_id,
            model=model,
            block_tokens=block_tokens,
            created=made_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            method=method,
            num_training_steps=built.num_training_steps,
            source=self.source,
            made_by=f"kvkeep {version('kvkeep')}",
            identity=built.identity,
            labels=self.labels,
        )
        with Registry(self.library) as registry:
            return registry.register_contents(draft, built.contents, signing_key=self.signing_key)

    def say(self, entry: Entry, verb: str, **more: Any) -> None:
        """Say what is there now; more for machines."""
        if self.as_json:
            click.echo(json.dumps(facts_of_entry(entry) | more))
        else:
            click.echo(f"{verb} {entry.cartridge_id}: {entry.manifest.num_tokens} tokens")
