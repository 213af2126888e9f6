# num_threads: 1 to 16. cpu_mask: a cpu_set_t for the threads that a call starts.

from kvkeep.transfer.base import Addresses, Digests, Flags

def store(
    source: Addresses,
    target: Addresses,
    page_bytes: int,
    digests_out: Digests,
    num_threads: int,
    cpu_mask: bytes,
    /,
) -> None: ...
def load(
    source: Addresses,
    target: Addresses,
    page_bytes: int,
    digests: Digests,
    ok_out: Flags,
    num_threads: int,
    cpu_mask: bytes,
    /,
) -> int: ...
def verify(
    addresses: Addresses,
    page_bytes: int,
    digests: Digests,
    ok_out: Flags,
    num_threads: int,
    cpu_mask: bytes,
    /,
) -> int: ...
def digest(
    addresses: Addresses,
    page_bytes: int,
    digests_out: Digests,
    num_threads: int,
    cpu_mask: bytes,
    /,
) -> None: ...
def begin_verify(
    starts: Addresses,
    num_layers: int,
    layer_stride: int,
    run_pages: int,
    page_bytes: int,
    digests: Digests,
    ok_out: Flags,
    gates: Addresses,
    num_threads: int,
    cpu_mask: bytes,
    /,
) -> object: ...
def end_verify(verification: object, /) -> int: ...
