"""What a cartridge says of itself: whose KV it is, how it lies, and what it was made from.

It travels inside the cartridge's file as JSON. Fields of one form never change their meaning, and
a reader passes over those that it does not know: what decides whether the KV may be used is the
geometry, which every form has, and ``identity``, whose entries are compared one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from kvkeep.model.errors import CorruptDataError, InputError, RefusedError
from kvkeep.protocol.messages import IDENTITY_PARTS_MAX, NAME_MAX, IdentityPart
from kvkeep.protocol.sequence_body import LAYERS_MAX, NAME
from kvkeep.protocol.tensors import DTYPES

FORM = "kvkeep.cartridge/1"
"""Name and number of this form."""
MANIFEST_BYTES_MAX = 48 << 10
"""As JSON inside the JSON of a file's header it may become three times as long; that fits."""
LABELS_MAX = 64
DTYPES_OF_CARTRIDGES = ("bfloat16", "float16", "float32")
"""What engines compute KV in; 8-bit KV needs scales, which belong to an engine."""
_NOT_OF_A_CARTRIDGE = ("layout.", "tenant", "kv_form")
"""Parts of an engine's identity that say how it keeps blocks and for whom, not what they are."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Text = Annotated[str, msgspec.Meta(max_length=NAME_MAX)]
LongText = Annotated[str, msgspec.Meta(max_length=4096)]
CartridgeId = Annotated[str, msgspec.Meta(pattern=rf"^(?:{NAME.pattern})\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Method = Literal["imported", "prefill", "trained", "composed"]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One cartridge in words and numbers."""

    form: Literal["kvkeep.cartridge/1"] = "kvkeep.cartridge/1"
    """Name and number of this form."""
    cartridge_id: CartridgeId
    """What requests call it: 1 to 256 letters, digits, ``.``, ``_``, ``:``, ``@`` and ``-``."""
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    """Name of the model, as its makers call it."""
    num_layers: Annotated[int, msgspec.Meta(ge=1, lt=LAYERS_MAX)]
    """Attention layers with KV of their own."""
    num_heads: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
    """KV heads of the whole model, all tensor-parallel ranks together."""
    head_dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
    """Elements of a key, and of a value, of one head."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """Of every key and value."""
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    """Tokens whose KV it holds."""
    num_aligned_tokens: Count
    """Of those, how many fill whole blocks."""
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    """Tokens per block of the engines it was made for."""
    num_blocks: Count
    """Whole blocks."""
    num_frozen_tokens: Count = 0
    """Leading tokens that training left as they were."""
    has_token_ids: bool = False
    """Whether it holds its tokens' ids; one that was trained or composed has none."""
    sha256: Sha256
    """Of all bytes behind the file's header."""
    num_bytes: Count
    """How many those are."""
    created: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]
    """When it was made, in UTC: ``2026-01-31T12:00:00Z``."""
    method: Method = "imported"
    """How its KV came to be: imported, by a prefill, trained, or composed of others."""
    num_training_steps: Count = 0
    """How long it was trained."""
    source: LongText = ""
    """What it was made from, for people."""
    made_by: Text = ""
    """Program and version that wrote it."""
    identity: Annotated[dict[Text, Text], msgspec.Meta(max_length=IDENTITY_PARTS_MAX)] = {}
    """What decides its bytes beside the tokens, by name, as an engine's connector says it (decision
    0017); empty where nobody knows, as after an import."""
    labels: Annotated[dict[Text, Text], msgspec.Meta(max_length=LABELS_MAX)] = {}
    """By which requests may be sent to it."""

    def __post_init__(self) -> None:
        num_blocks = self.num_tokens // self.block_tokens
        wanted = {
            "num_blocks": num_blocks,
            "num_aligned_tokens": num_blocks * self.block_tokens,
            "num_bytes": self.kv_bytes + (self.num_tokens * 4 if self.has_token_ids else 0),
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)} and has to be {value}")
        if self.num_frozen_tokens > self.num_tokens:
            raise ValueError("num_frozen_tokens is larger than num_tokens")

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        per_token = 2 * self.num_layers * self.num_heads * self.head_dim
        return self.num_tokens * per_token * DTYPES[self.dtype][1]

    def encoded(self) -> bytes:
        """As JSON.

        Raises:
            InputError: It is too long to be written.
        """
        text = msgspec.json.encode(self)
        if len(text) > MANIFEST_BYTES_MAX:
            raise InputError(
                f"the manifest of cartridge {self.cartridge_id} has {len(text)} bytes and at most "
                f"{MANIFEST_BYTES_MAX} are taken: shorten its source, labels or identity"
            )
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a maker says of a cartridge; the rest of its manifest follows from its KV."""

    cartridge_id: str
    model: str
    block_tokens: int
    created: str
    method: Method = "imported"
    num_training_steps: int = 0
    source: str = ""
    made_by: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class _Form(msgspec.Struct):
    form: str


def parse_manifest(text: bytes, source: str) -> Manifest:
    """Read a manifest.

    Args:
        text: JSON.
        source: Where it comes from, for the sentence.

    Raises:
        InputError: It is of another form than this version reads.
        CorruptDataError: It contradicts itself, or is none.
    """
    try:
        form = msgspec.json.decode(text, type=_Form).form
        if form == FORM:
            return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise CorruptDataError(
            f"the manifest of {source} can't be used ({' '.join(str(error).split())}): get the "
            "cartridge anew"
        ) from error
    raise InputError(
        f"{source} is of the form {form[:80]!r} and this kvkeep reads {FORM}: use the version that "
        "wrote it, or a newer one"
    )


def checked_manifest(manifest: Manifest) -> Manifest:
    """The same manifest, if a reader would take it: values made in Python are not checked.

    Raises:
        InputError: One sentence that names the field.
    """
    try:
        return msgspec.json.decode(manifest.encoded(), type=Manifest)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise InputError(
            f"the cartridge can't be described so ({' '.join(str(error).split())}): mend it"
        ) from error


# ---- Whether a cartridge goes with an engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What an engine, or a person, needs a cartridge to be; what is left out is not compared."""

    model: str = ""
    num_layers: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    block_tokens: int | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    """As `identity_of` gives it."""


def identity_of(parts: list[IdentityPart]) -> dict[str, str]:
    """What decides KV, out of what a connector says of its engine's namespace.

    How blocks are laid out and stored, and whose they are, is left out: a cartridge holds canonical
    keys and values, which any layout is made from.
    """
    return {
        part.name: part.value for part in parts if not part.name.startswith(_NOT_OF_A_CARTRIDGE)
    }


def find_mismatches(manifest: Manifest, expected: Expected) -> list[str]:
    """One sentence part for each field in which a cartridge is not what is expected.

    Where both sides know the model's weights by their bytes, these decide and not its name.
    Identities are compared if both sides have one: an entry that only one has is a mismatch.
    """
    found = []
    are_weights_known = "weights" in manifest.identity and "weights" in expected.identity
    if expected.model and expected.model != manifest.model and not are_weights_known:
        found.append(_mismatch("model", manifest.model, expected.model))
    for name in ("num_layers", "num_heads", "head_dim", "dtype", "block_tokens"):
        wanted = getattr(expected, name)
        if wanted is not None and wanted != getattr(manifest, name):
            found.append(_mismatch(name, getattr(manifest, name), wanted))
    if manifest.identity and expected.identity:
        for name in sorted(manifest.identity.keys() | expected.identity.keys()):
            mine, theirs = manifest.identity.get(name), expected.identity.get(name)
            if mine != theirs:
                found.append(_mismatch(name, mine, theirs))
    return found


def check_expected(manifest: Manifest, expected: Expected) -> None:
    """Refuse a cartridge that is not what is expected.

    Raises:
        RefusedError: One sentence that names every field.
    """
    found = find_mismatches(manifest, expected)
    if found:
        raise RefusedError(
            f"cartridge {manifest.cartridge_id} does not go with this engine: {'; '.join(found)}: "
            "build it for this one"
        )


def _mismatch(name: str, mine: object, theirs: object) -> str:
    return f"{name} mismatch, cartridge {_shown(mine)} and engine {_shown(theirs)}"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
