"""``kvkeep cartridge``: inspect, verify and register cartridges; list, keep and remove them."""

import importlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import msgspec
import platformdirs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvkeep.cartridges.checkpoint import SUFFIXES, read_checkpoint, write_checkpoint
from kvkeep.cartridges.contents import Contents
from kvkeep.cartridges.file_format import (
    SUFFIX,
    Head,
    export_cartridge,
    read_cartridge,
    read_head,
    verify_cartridge,
)
from kvkeep.cartridges.manifest import Draft, Expected
from kvkeep.cartridges.registry import Entry, Registry
from kvkeep.cartridges.signing import SigningKey, load_public_key
from kvkeep.cli.status import readable_bytes
from kvkeep.model.clock import wall_clock_s
from kvkeep.model.errors import CorruptDataError, InputError, RefusedError

EXIT_WRONG = 1
MAKERS = {
    "build": "kvkeep.cli.cartridge_build",
    "compose": "kvkeep.cli.cartridge_compose",
    "train": "kvkeep.cli.cartridge_train",
}
"""Commands that make cartridges, by name, and the modules that they are in."""
_STANDINGS = {
    "unsigned": "nobody",
    "unchecked": "{} (not checked: pip install kvkeep[encryption])",
    "signed": "{} (the signature is right; name --trusted-key to say whose it has to be)",
    "trusted": "{} (a key that you trust)",
}
_Option = Callable[[Callable[..., None]], Callable[..., None]]
_as_json: _Option = click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
_library: _Option = click.option(
    "--library",
    type=click.Path(path_type=Path),
    help="Folder of the registry; by default this user's own.",
)
_trusted: _Option = click.option(
    "--trusted-key",
    "trusted_keys",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Public key (PEM) of a maker; one of those given has to have signed it.",
)


class _Group(click.Group):
    """Commands of this module, and makers that are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every name, in order."""
        return sorted({*super().list_commands(ctx), *MAKERS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command; None for a name that is none."""
        if cmd_name not in MAKERS:
            return super().get_command(ctx, cmd_name)
        command = getattr(importlib.import_module(MAKERS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Group)
def cartridge() -> None:
    """Keep a document's KV, computed once, ready for every engine of a host."""


def library_folder(library: Path | None) -> Path:
    """Folder of the registry, default applied."""
    return library or platformdirs.user_data_path("kvkeep") / "cartridges"


def find_path(target: str, library: Path | None) -> Path:
    """The file that is meant: a path, or the id of a registered cartridge.

    Raises:
        InputError: There is no such file and no such cartridge.
    """
    folder = library_folder(library)
    if not Path(target).exists() and "/" not in target and folder.is_dir():
        with Registry(folder) as registry:
            entry = registry.get(target)
        if entry is not None:
            return entry.path
    if not Path(target).exists():
        raise InputError(
            f"{target} is neither a file nor a registered cartridge: see kvkeep cartridge ls"
        )
    return Path(target)


# ---- inspect


@cartridge.command()
@click.argument("target", metavar="FILE|ID")
@_library
@_as_json
def inspect(target: str, library: Path | None, as_json: bool) -> None:
    """Show what a cartridge says of itself; kvkeep cartridge verify checks its KV too."""
    path = find_path(target, library)
    if path.suffix in SUFFIXES:
        facts = facts_of_checkpoint(path, read_checkpoint(path))
    else:
        facts = facts_of(path, read_head(path))
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        rows = value.items() if name == "manifest" else [(name, value)]
        for field, told in rows:
            for line in _lines(field, told):
                click.echo(line)


def facts_of(path: Path, head: Head) -> dict[str, Any]:
    """A cartridge for a machine to read."""
    return {
        "path": str(path),
        "file_bytes": head.file_bytes,
        "digest": head.digest,
        "signed_by": head.signer,
        "signature": head.standing,
        "manifest": msgspec.to_builtins(head.manifest),
    }


def facts_of_checkpoint(path: Path, contents: Contents) -> dict[str, Any]:
    """What there is to know of a ``.pt`` file."""
    num_tokens, num_heads, head_dim = contents.shape
    return {
        "path": str(path),
        "file_bytes": path.stat().st_size,
        "num_layers": len(contents.layers),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "dtype": contents.dtype,
        "num_tokens": num_tokens,
        "num_frozen_tokens": contents.num_frozen_tokens,
    }


def _lines(field: str, told: Any) -> list[str]:
    if isinstance(told, dict):
        return [f"{field}.{name}: {_printable(value)}" for name, value in sorted(told.items())]
    return [f"{field}: {_printable(told)}"]


def _printable(value: object) -> str:
    """A value of a file from anywhere, for a terminal."""
    return "".join(each if each.isprintable() else "?" for each in str(value))


# ---- verify


def _expectations(command: Callable[..., None]) -> Callable[..., None]:
    for name in ("block-tokens", "head-dim", "num-heads", "num-layers"):
        command = click.option(f"--{name}", type=int, help=f"The {name} it has to have.")(command)
    command = click.option("--dtype", help="The data type it has to have.")(command)
    return click.option("--model", default="", help="The model it has to be for.")(command)


@cartridge.command()
@click.argument("targets", metavar="FILE|ID...", nargs=-1, required=True)
@_expectations
@_trusted
@_library
@_as_json
def verify(
    targets: Sequence[str],
    trusted_keys: Sequence[Path],
    library: Path | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Check every byte of cartridges, their signatures, and whether they go with a model.

    Exit code 0 if all are right, 1 if one is not, 2 for bad input.
    """
    trusted = [load_public_key(path) for path in trusted_keys]
    results = []
    for path in [find_path(target, library) for target in targets]:
        try:
            sentence = _verified(path, Expected(**wanted), trusted)
            results.append({"path": str(path), "ok": True, "detail": sentence})
        except (CorruptDataError, RefusedError) as error:
            results.append({"path": str(path), "ok": False, "detail": str(error)})
        if not as_json:
            click.echo(results[-1]["detail"], err=not results[-1]["ok"])
    if as_json:
        click.echo(json.dumps({"cartridges": results}))
    if not all(result["ok"] for result in results):
        click.get_current_context().exit(EXIT_WRONG)


def _verified(path: Path, expected: Expected, trusted: Sequence[bytes]) -> str:
    if path.suffix in SUFFIXES:
        contents = read_checkpoint(path)
        if trusted or expected != Expected():
            raise InputError(
                f"{path} names no model and has no signature: register it first, then verify that"
            )
        return f"{path}: can be imported, {contents.num_tokens} tokens; nothing in it can be proven"
    head = verify_cartridge(path, expected=expected, trusted=trusted)
    signed = _STANDINGS[head.standing].format(head.signer)
    return f"{path}: right, {head.manifest.num_tokens} tokens; signed by {signed}"


# ---- register


@cartridge.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--id", "cartridge_id", help="Of a .pt file: what requests will call it.")
@click.option("--model", help="Of a .pt file: the model it was made with.")
@click.option("--block-tokens", type=int, help="Of a .pt file: tokens per block of the engines.")
@click.option("--source", help="Of a .pt file: what it was made from.")
@click.option("--training-steps", type=int, help="Of a .pt file: how long it was trained.")
@click.option(
    "--label", "labels", multiple=True, help="Of a .pt file: NAME=VALUE; may be repeated."
)
@click.option(
    "--sign",
    "key_path",
    type=click.Path(path_type=Path),
    help="Of a .pt file: key to sign it with.",
)
@_trusted
@_library
@_as_json
def register(
    path: Path, trusted_keys: Sequence[Path], library: Path | None, as_json: bool, **told: Any
) -> None:
    """Take a copy of a cartridge, every byte checked; one of the same id is replaced.

    FILE is a cartridge of kvkeep's, or a .pt file with trainable_keys and trainable_values.
    """
    trusted = [load_public_key(key) for key in trusted_keys]
    if path.suffix not in SUFFIXES:
        given = [name for name, value in told.items() if value]
        if given:
            raise InputError(
                f"{path} says itself what it is: leave out what is for .pt files ("
                f"{', '.join(given)})"
            )
        with Registry(library_folder(library)) as registry:
            entry = registry.register(path, trusted=trusted)
    else:
        if trusted:
            raise InputError("a .pt file has no signature: leave out --trusted-key")
        entry = _import(path, library_folder(library), told)
    if as_json:
        click.echo(json.dumps(facts_of_entry(entry)))
    else:
        click.echo(f"registered {entry.cartridge_id}: {entry.manifest.num_tokens} tokens")


def _import(path: Path, folder: Path, told: dict[str, Any]) -> Entry:
    options = {"cartridge_id": "--id", "model": "--model", "block_tokens": "--block-tokens"}
    missing = [option for name, option in options.items() if not told[name]]
    if missing:
        raise InputError(f"a .pt file does not say what it is: add {', '.join(missing)}")
    made_at = datetime.fromtimestamp(wall_clock_s(), UTC)
    draft = Draft(
        cartridge_id=told["cartridge_id"],
        model=told["model"],
        block_tokens=told["block_tokens"],
        created=made_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        num_training_steps=told["training_steps"] or 0,
        source=told["source"] or path.name,
        made_by=f"kvkeep {version('kvkeep')}",
        labels=dict(parse_label(label) for label in told["labels"]),
    )
    key = SigningKey.load(told["key_path"]) if told["key_path"] else None
    contents = read_checkpoint(path)
    with Registry(folder) as registry:
        return registry.register_contents(draft, contents, signing_key=key)


def parse_label(text: str) -> tuple[str, str]:
    """A label such as ``topic=ships``.

    Raises:
        InputError: It is none.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InputError(f"{text!r} is no label: write NAME=VALUE")
    return name, value


# ---- pin, unpin, export


@cartridge.command()
@click.argument("cartridge_ids", metavar="ID...", nargs=-1, required=True)
@_library
def pin(cartridge_ids: Sequence[str], library: Path | None) -> None:
    """Keep cartridges: not removed but by force, and in the host's memory once they are there."""
    with Registry(library_folder(library)) as registry:
        for cartridge_id in cartridge_ids:
            registry.pin(cartridge_id)
            click.echo(f"pinned {cartridge_id}")


@cartridge.command()
@click.argument("cartridge_ids", metavar="ID...", nargs=-1, required=True)
@_library
def unpin(cartridge_ids: Sequence[str], library: Path | None) -> None:
    """Undo kvkeep cartridge pin."""
    with Registry(library_folder(library)) as registry:
        for cartridge_id in cartridge_ids:
            registry.unpin(cartridge_id)
            click.echo(f"unpinned {cartridge_id}")


@cartridge.command()
@click.argument("target", metavar="FILE|ID")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace what is there.")
@_library
def export(target: str, path: Path, force: bool, library: Path | None) -> None:
    """Write a cartridge to PATH, every byte checked.

    PATH ends in .safetensors, or in .pt: that is what other programs read, and has neither
    manifest nor token ids.
    """
    source = find_path(target, library)
    if source.suffix in SUFFIXES:
        raise InputError(f"{source} is a .pt file already: register it first, then export that")
    if path.suffix not in (SUFFIX, *SUFFIXES):
        raise InputError(f"{path} says no form: let it end in {SUFFIX} or {SUFFIXES[0]}")
    if path.exists() and not force:
        raise InputError(f"{path} is there already: name another, or add --force")
    if path.suffix == SUFFIX:
        manifest = export_cartridge(source, path).manifest
    else:
        loaded = read_cartridge(source)
        manifest = loaded.head.manifest
        write_checkpoint(path, loaded.contents)
    click.echo(f"exported {manifest.cartridge_id}: {manifest.num_tokens} tokens, {path}")


# ---- ls, rm


@cartridge.command("ls")
@click.option("--model", help="Only those for this model.")
@click.option("--label", help="Only those with this label, NAME=VALUE.")
@_library
@_as_json
def list_cartridges(
    model: str | None, label: str | None, library: Path | None, as_json: bool
) -> None:
    """List registered cartridges."""
    chosen = None if label is None else parse_label(label)
    with Registry(library_folder(library)) as registry:
        entries = registry.list_entries(model=model, label=chosen)
    if as_json:
        click.echo(json.dumps({"cartridges": [facts_of_entry(entry) for entry in entries]}))
        return
    table = Table(box=None, pad_edge=False)
    for head in ("id", "model", "tokens", "blocks", "size", "signed by", "state"):
        table.add_column(head)
    for entry in entries:
        manifest = entry.manifest
        state = "pinned" if entry.is_pinned else "registered"
        table.add_row(
            manifest.cartridge_id,
            escape(_printable(manifest.model)),
            f"{manifest.num_tokens:,}",
            f"{manifest.num_blocks:,} of {manifest.block_tokens}",
            readable_bytes(entry.file_bytes),
            entry.signer or "-",
            state if entry.has_file else "its file is gone: register it again",
        )
    Console().print(table)


def facts_of_entry(entry: Entry) -> dict[str, Any]:
    """A registered cartridge for a machine to read."""
    return {
        "path": str(entry.path),
        "file_bytes": entry.file_bytes,
        "has_file": entry.has_file,
        "digest": entry.digest,
        "signed_by": entry.signer,
        "registered_s": entry.registered_s,
        "is_pinned": entry.is_pinned,
        "manifest": msgspec.to_builtins(entry.manifest),
    }


@cartridge.command("rm")
@click.argument("cartridge_id", metavar="ID")
@click.option("--force", is_flag=True, help="Even if it is pinned.")
@_library
def remove(cartridge_id: str, force: bool, library: Path | None) -> None:
    """Remove a registered cartridge and its file."""
    with Registry(library_folder(library)) as registry:
        if not registry.remove(cartridge_id, force=force):
            raise InputError(f"there is no cartridge {cartridge_id!r}: see kvkeep cartridge ls")
    click.echo(f"removed {cartridge_id}")
