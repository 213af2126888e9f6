"""Who made a cartridge: right, wrong, unknown and missing signatures."""

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

from kvkeep.cartridges.signing import (
    Signature,
    SigningKey,
    check_signature,
    load_public_key,
    signer_of,
)
from kvkeep.model.errors import CorruptDataError, InputError, RefusedError

TEXT = b"a manifest"
PRIVATE = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = PRIVATE.public_key().public_bytes_raw()
OTHER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
KEY = SigningKey(PRIVATE)


def private_pem(key: ed25519.Ed25519PrivateKey | x25519.X25519PrivateKey) -> bytes:
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def kept(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_keys_of_openssl_are_read(tmp_path: Path) -> None:
    """A private key signs, and its public half says whose signature it is."""
    public = PRIVATE.public_key().public_bytes(
        form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    )
    signature = SigningKey.load(kept(tmp_path / "key", private_pem(PRIVATE))).sign(TEXT)

    trusted = [load_public_key(kept(tmp_path / "pub", public, 0o644))]

    assert trusted == [PUBLIC]
    assert check_signature(TEXT, signature, trusted, "there") == "trusted"
    assert signature.signer == signer_of(PUBLIC)
    assert len(signature.signer) == 16


def test_a_right_signature_by_a_key_nobody_asked_about() -> None:
    """It is checked, and counts as signed; without one a cartridge is unsigned."""
    assert check_signature(TEXT, KEY.sign(TEXT), [], "there") == "signed"
    assert check_signature(TEXT, None, [], "there") == "unsigned"


def test_a_missing_signature_is_refused_where_one_is_wanted() -> None:
    """Taking the signature off is no way around it."""
    with pytest.raises(RefusedError, match="the signature of there is missing"):
        check_signature(TEXT, None, [PUBLIC], "there")


def test_another_s_signature_is_refused_by_name() -> None:
    """A right signature by a key that is not trusted does not pass."""
    with pytest.raises(RefusedError, match=f"by the key {signer_of(PUBLIC)}, which is not among"):
        check_signature(TEXT, KEY.sign(TEXT), [OTHER], "there")


@pytest.mark.parametrize("trusted", [[], [PUBLIC]])
def test_a_wrong_signature_is_refused(trusted: list[bytes]) -> None:
    """Whether or not somebody asked for it: of another text, of another key, of another program."""
    right = KEY.sign(TEXT)
    of_nothing = Signature(right.public_key, PRIVATE.sign(TEXT).hex())
    flipped = Signature(
        right.public_key, f"{int(right.signature[0], 16) ^ 1:x}" + right.signature[1:]
    )
    for text, signature in [(TEXT + b"!", right), (TEXT, of_nothing), (TEXT, flipped)]:
        with pytest.raises(CorruptDataError, match="the signature of there is not that of its"):
            check_signature(text, signature, trusted, "there")


@pytest.mark.parametrize("data", [b"", b"nothing", private_pem(x25519.X25519PrivateKey.generate())])
def test_what_is_no_key_is_refused(tmp_path: Path, data: bytes) -> None:
    """Another kind of key, or none: the sentence says how to make one."""
    path = kept(tmp_path / "key", data)
    for load in (SigningKey.load, load_public_key):
        with pytest.raises(InputError, match=r"no Ed25519 (private|public) key.*openssl genpkey"):
            load(path)


def test_a_key_with_a_password_is_refused(tmp_path: Path) -> None:
    """Nobody is asked for one."""
    locked = PRIVATE.private_bytes(
        form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"secret")
    )
    with pytest.raises(InputError, match="without a password"):
        SigningKey.load(kept(tmp_path / "key", locked))


def test_a_signing_key_open_to_others_is_refused(tmp_path: Path) -> None:
    """Whoever reads it can sign."""
    with pytest.raises(InputError, match="open to others"):
        SigningKey.load(kept(tmp_path / "key", private_pem(PRIVATE), 0o644))


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """One sentence, which names the file."""
    with pytest.raises(InputError, match=r"gone.*can't be read"):
        load_public_key(tmp_path / "gone")


def test_without_the_package_a_signature_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is unchecked where nobody asked, and refused where somebody did."""
    signature = KEY.sign(TEXT)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)

    assert check_signature(TEXT, signature, [], "there") == "unchecked"
    with pytest.raises(InputError, match=r"pip install kvkeep.encryption"):
        check_signature(TEXT, signature, [PUBLIC], "there")
    with pytest.raises(RefusedError, match="missing"):
        check_signature(TEXT, None, [PUBLIC], "there")


def test_cartridges_are_read_without_the_package_and_without_torch() -> None:
    """Whoever signs nothing needs neither; the command's help loads neither."""
    program = (
        "import sys; import kvkeep.cartridges.registry, kvkeep.cartridges.checkpoint;"
        "print(sorted({'cryptography', 'torch', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"
