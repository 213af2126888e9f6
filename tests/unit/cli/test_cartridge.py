"""``kvkeep cartridge``: what is shown, what is refused, and with which exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kvkeep.cartridges.checkpoint import write_checkpoint
from kvkeep.cartridges.registry import Registry
from kvkeep.cartridges.signing import SigningKey
from kvkeep.cli.cartridge import library_folder, parse_label
from kvkeep.cli.main import main
from kvkeep.model.errors import InputError
from tests.unit.cartridges.made import contents, written

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def run(tmp_path: Path, command: str, *args: object) -> Result:
    library = ["--library", str(tmp_path / "library")]
    return CliRunner().invoke(main, ["cartridge", command, *map(str, args), *library])


def told(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def key_files(tmp_path: Path) -> tuple[Path, Path]:
    """A signing key and its public half."""
    private, public = tmp_path / "maker.key", tmp_path / "maker.pub"
    private.write_bytes(
        PRIVATE.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    private.chmod(0o600)
    public.write_bytes(
        PRIVATE.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A ``.pt`` file."""
    path = tmp_path / "cart.pt"
    write_checkpoint(path, contents(num_frozen_tokens=1))
    return path


def test_the_group_has_its_commands_and_no_stubs() -> None:
    """What is listed works."""
    output = CliRunner().invoke(main, ["cartridge", "--help"]).output

    listed = [line.split()[0] for line in output.partition("Commands:")[2].splitlines() if line]
    making, keeping = ["build", "compose", "train"], ["export", "pin", "register", "rm", "unpin"]
    assert listed == sorted([*making, *keeping, "inspect", "ls", "verify"])


# ---- inspect


def test_a_cartridge_is_inspected(tmp_path: Path) -> None:
    """All its manifest, for people and for machines."""
    path, head = written(tmp_path, labels={"topic": "ships"}, source="a logbook\x1b[2J")
    shown = run(tmp_path, "inspect", path)

    assert shown.exit_code == 0
    for line in (
        "cartridge_id: ships",
        "num_heads: 2",
        "labels.topic: ships",
        "source: a logbook?[2J",
    ):
        assert line in shown.stdout.splitlines()
    found = told(run(tmp_path, "inspect", path, "--json"))
    assert (found["digest"], found["signature"]) == (head.digest, "unsigned")
    assert found["manifest"]["num_tokens"] == 6


def test_a_checkpoint_is_inspected(tmp_path: Path, checkpoint: Path) -> None:
    """Its geometry, which is all it says."""
    found = told(run(tmp_path, "inspect", checkpoint, "--json"))

    assert (found["num_layers"], found["num_heads"], found["head_dim"]) == (2, 2, 4)
    assert (found["num_tokens"], found["num_frozen_tokens"], found["dtype"]) == (6, 1, "float32")


def test_a_registered_one_is_found_by_its_id(tmp_path: Path) -> None:
    """Without knowing where its file lies."""
    run(tmp_path, "register", written(tmp_path)[0])

    assert told(run(tmp_path, "inspect", "ships", "--json"))["manifest"]["model"] == "tiny"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_not_there_is_bad_input(tmp_path: Path, command: str) -> None:
    """One sentence and exit code 2."""
    result = run(tmp_path, command, "gone")

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "kvkeep cartridge: gone is neither a file nor a registered cartridge: "
        "see kvkeep cartridge ls\n"
    )


# ---- verify


def test_a_right_one_passes(tmp_path: Path) -> None:
    """With everything that was asked for."""
    path, _ = written(tmp_path)
    wanted = ["--model", "tiny", "--num-layers", 2, "--num-heads", 2, "--head-dim", 4]
    result = run(tmp_path, "verify", path, *wanted, "--dtype", "float32", "--block-tokens", 4)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{path}: right, 6 tokens; signed by nobody\n"


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--model", "other", "model mismatch, cartridge tiny and engine other"),
        ("--num-layers", 3, "num_layers mismatch, cartridge 2 and engine 3"),
        ("--num-heads", 8, "num_heads mismatch"),
        ("--head-dim", 64, "head_dim mismatch"),
        ("--dtype", "bfloat16", "dtype mismatch"),
        ("--block-tokens", 16, "block_tokens mismatch"),
    ],
)
def test_one_for_another_engine_fails_by_name(
    tmp_path: Path, option: str, value: object, named: str
) -> None:
    """Exit code 1, and which field it is."""
    result = run(tmp_path, "verify", written(tmp_path)[0], option, value)

    assert (result.exit_code, result.stdout) == (1, "")
    assert named in result.stderr


def test_a_wrong_one_among_right_ones_fails(tmp_path: Path) -> None:
    """All are looked at, and each is told."""
    paths = [written(tmp_path, name)[0] for name in ("a", "b", "c")]
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    result = run(tmp_path, "verify", *paths, "--json")

    found = json.loads(result.stdout)["cartridges"]
    assert (result.exit_code, [each["ok"] for each in found]) == (1, [True, False, True])
    assert "truncated" in found[1]["detail"]


def test_signatures_are_verified(tmp_path: Path, key_files: tuple[Path, Path]) -> None:
    """By the keys that are named; without any, what is there has to be right."""
    signed, head = written(tmp_path, "signed", signing_key=SigningKey(PRIVATE))
    unsigned, _ = written(tmp_path)

    named = run(tmp_path, "verify", signed, "--trusted-key", key_files[1])
    assert named.stdout.endswith(f"signed by {head.signer} (a key that you trust)\n")
    assert "name --trusted-key to say whose" in run(tmp_path, "verify", signed).stdout
    missing = run(tmp_path, "verify", unsigned, "--trusted-key", key_files[1])
    assert (missing.exit_code, "is missing" in missing.stderr) == (1, True)
    assert run(tmp_path, "verify", unsigned, "--trusted-key", unsigned).exit_code == 2


def test_a_checkpoint_can_t_be_verified_against_anything(tmp_path: Path, checkpoint: Path) -> None:
    """It says so rather than passing."""
    assert run(tmp_path, "verify", checkpoint).stdout.endswith("nothing in it can be proven\n")
    result = run(tmp_path, "verify", checkpoint, "--model", "tiny")
    assert (result.exit_code, "register it first" in result.stderr) == (2, True)


# ---- register, ls, rm


def test_one_is_registered_listed_and_removed(tmp_path: Path) -> None:
    """The whole of its life here."""
    path, head = written(tmp_path)

    assert run(tmp_path, "register", path).stdout == "registered ships: 6 tokens\n"
    (entry,) = told(run(tmp_path, "ls", "--json"))["cartridges"]
    assert (entry["digest"], entry["has_file"]) == (head.digest, True)
    assert "ships" in run(tmp_path, "ls").stdout
    assert run(tmp_path, "rm", "ships").stdout == "removed ships\n"
    assert told(run(tmp_path, "ls", "--json"))["cartridges"] == []


def test_a_checkpoint_is_registered_and_signed(
    tmp_path: Path, checkpoint: Path, key_files: tuple[Path, Path]
) -> None:
    """With what is said of it."""
    said = ["--id", "doc", "--model", "tiny", "--block-tokens", 4, "--training-steps", 9]
    said += ["--label", "topic=ships", "--label", "a=b=c", "--sign", key_files[0]]
    manifest = told(run(tmp_path, "register", checkpoint, *said, "--json"))["manifest"]

    assert (manifest["cartridge_id"], manifest["model"], manifest["num_blocks"]) == (
        "doc",
        "tiny",
        1,
    )
    assert (manifest["labels"], manifest["num_training_steps"]) == (
        {"topic": "ships", "a": "b=c"},
        9,
    )
    assert (manifest["source"], manifest["num_frozen_tokens"]) == ("cart.pt", 1)
    assert run(tmp_path, "verify", "doc", "--trusted-key", key_files[1]).exit_code == 0


def test_only_those_that_were_asked_for_are_listed(tmp_path: Path) -> None:
    """By model and by label."""
    for name, labels in (("a", {"topic": "ships"}), ("b", {})):
        run(tmp_path, "register", written(tmp_path, name, labels=labels)[0])

    def ids(*args: str) -> list[str]:
        found = told(run(tmp_path, "ls", *args, "--json"))["cartridges"]
        return [entry["manifest"]["cartridge_id"] for entry in found]

    assert (ids("--label", "topic=ships"), ids("--model", "tiny")) == (["a"], ["a", "b"])
    assert ids("--model", "other") == []


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "add --id, --model, --block-tokens"),
        (["--id", "doc", "--model", "tiny"], "add --block-tokens"),
        (["--id", "a b", "--model", "tiny", "--block-tokens", "4"], "cartridge_id"),
        (["--id", "a", "--model", "tiny", "--block-tokens", "-4"], "block_tokens must be"),
        (["--id", "a", "--model", "t", "--block-tokens", "4", "--label", "x"], "write NAME=VALUE"),
        (["--trusted-key", "KEY"], "a .pt file has no signature"),
    ],
)
def test_a_checkpoint_has_to_be_described(
    tmp_path: Path, checkpoint: Path, key_files: tuple[Path, Path], args: list[str], named: str
) -> None:
    """The sentence says what is missing or wrong."""
    args = [str(key_files[1]) if arg == "KEY" else arg for arg in args]
    result = run(tmp_path, "register", checkpoint, *args)

    assert (result.exit_code, result.stdout) == (2, "")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_cartridge_is_not_described_twice(tmp_path: Path) -> None:
    """It says itself what it is."""
    result = run(tmp_path, "register", written(tmp_path)[0], "--model", "other")

    assert (result.exit_code, "says itself what it is" in result.stderr) == (2, True)


def test_a_pinned_one_is_removed_by_force_only(tmp_path: Path) -> None:
    """And one that is not there not at all."""
    run(tmp_path, "register", written(tmp_path)[0])
    with Registry(tmp_path / "library") as registry:
        registry.pin("ships")

    refused = run(tmp_path, "rm", "ships")
    assert (refused.exit_code, "is pinned" in refused.stderr) == (2, True)
    assert run(tmp_path, "rm", "ships", "--force").exit_code == 0
    assert run(tmp_path, "rm", "ships").exit_code == 2


def test_a_label_has_a_name_and_a_value() -> None:
    """The value may be empty and hold anything."""
    assert (parse_label("a=b=c"), parse_label("a=")) == (("a", "b=c"), ("a", ""))
    for text in ("a", "=b", ""):
        with pytest.raises(InputError, match="write NAME=VALUE"):
            parse_label(text)


def test_the_library_is_this_user_s_own() -> None:
    """Unless another is named."""
    assert library_folder(Path("there")) == Path("there")
    assert library_folder(None).parts[-2:] == ("kvkeep", "cartridges")
