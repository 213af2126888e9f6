"""What ``kv_connector_extra_config`` may hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kvkeep.cartridges.store.library import default_folder
from kvkeep.model.errors import InputError
from kvkeep.model.settings.wording import wording_of


class ConnectorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one engine's connector."""

    socket: str
    """Path of the daemon's control socket."""
    tenant: str = ""
    """Part of the namespace: engines of different tenants never share blocks. The daemon knows the
    tenant's share of the pool (``quotas``) by this name."""
    tenant_key_file: str = ""
    """File of 32 bytes or 64 hexadecimal digits (mode 0600), the same for all engines of the tenant
    on any host: it keys the block hashes, so that nobody without it can guess them."""
    model_identity: str = ""
    """Overrides the digest of the weights: whoever sets it vouches that equal means equal."""
    kv_form: Literal["exact", "int8"] = "exact"
    """How blocks are stored: ``exact``, to the bit, or ``int8``, in half the bytes, with values off
    by up to a 127th of the largest among 64. Part of the namespace; engines on CPUs only."""
    cartridges: bool = False
    """This engine serves cartridges, also those that are put in front of prompts: a request that
    can't have its cartridge fails, so kv_load_failure_policy has to be ``fail``."""
    cartridge_library: str = ""
    """Folder of the registry whose cartridges requests may name; empty: this user's own, if
    ``cartridges`` is set. Alone it serves those whose text the prompt holds; where one can't be
    had the text is computed."""
    cartridge_keys: list[str] = []
    """Files with public keys in PEM, one of which has to have signed a cartridge; none: it need
    not be signed."""
    store: bool = True
    """Whether blocks are stored."""
    load: bool = True
    """Whether blocks are loaded."""
    planner: Literal["auto", "load"] = "auto"
    """Whether blocks are loaded only where that was measured to be faster than computing them, or
    always."""
    lease_s: Annotated[float, msgspec.Meta(gt=1, le=3600)] = 30.0
    """Asked for each lease, in seconds; far longer than any load takes."""
    lookup_wait_ms: Annotated[float, msgspec.Meta(ge=0, le=50)] = 2.0
    """How long one engine step may wait for answers of the daemon, in milliseconds."""
    patience_ms: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 250.0
    """After this long without an answer the daemon counts as lost, in milliseconds."""
    handoff_wait_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 1.0
    """How long a request waits for blocks that a prefill engine named to it, in seconds; what has
    not come by then is computed."""
    announce_blocks: bool = False
    """Whether the engine's block events (vLLM's ``--kv-events-config``) also say what its stored
    blocks are of, so that a router that hears the daemon knows their prompts."""
    start_wait_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 20.0
    """How long the start of the engine waits for the daemon before it goes on without."""
    copy_threads: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Threads per load; 0 takes one per core this process may use, at most 4."""
    gpu_copies: Literal["staged", "direct"] = "staged"
    """How blocks reach a GPU: through staging buffers, or read from the pool by the GPU itself,
    layer by layer under the forward pass (docs/performance.md says what was measured)."""
    store_jobs_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    """Store jobs in flight; further blocks are not stored."""

    @property
    def serves_cartridges(self) -> bool:
        """Whether requests may name cartridges."""
        return self.cartridges or bool(self.cartridge_library)

    @property
    def library_folder(self) -> Path:
        """Where the registry lies whose cartridges requests may name."""
        named = self.cartridge_library
        return Path(named).expanduser() if named else default_folder()


def load_settings(extra: Mapping[str, Any]) -> ConnectorSettings:
    """Check what the user wrote.

    Raises:
        InputError: One sentence that names the field and the mend.
    """
    values = dict(extra)
    try:
        return msgspec.convert(values, ConnectorSettings, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(
            "kv_connector_extra_config is wrong: "
            f"{wording_of(str(error), values, ConnectorSettings)}"
        ) from error
