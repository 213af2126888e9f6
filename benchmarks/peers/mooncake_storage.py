"""A Mooncake storage process: offers one segment of memory to the store and waits to be stopped."""

import signal
import sys

from mooncake.store import MooncakeDistributedStore


def main() -> None:
    """Mount a segment; arguments: the master's address, the segment's size in bytes."""
    master, segment_bytes = sys.argv[1], int(sys.argv[2])
    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, 64 << 20, "tcp", "", master)
    if code:
        sys.exit(f"the segment could not be mounted: code {code}")
    print("ready", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    store.close()


if __name__ == "__main__":
    main()
