"""Where a router's engines come from besides its command line and its API."""

from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from kvkeep.model.clock import Clock
from kvkeep.router.membership.etcd import EtcdSettings, EtcdSource
from kvkeep.router.membership.file import FileSource
from kvkeep.router.membership.member import Member
from kvkeep.router.membership.roster import ETCD, FILE, Roster

POLL_S = 1.0
"""Between two looks at the file of engines; a change counts at the second."""


class Sources:
    """A file and etcd, as far as the settings name them; nothing runs yet."""

    def __init__(
        self, roster: Roster, clock: Clock, engines_file: str, etcd: EtcdSettings | None
    ) -> None:
        """Read the file.

        Raises:
            InputError: It can't be read or is wrong.
        """
        self.file: FileSource | None = None
        self.etcd: EtcdSource | None = None

        def declare(source: str, members: Sequence[Member]) -> None:
            roster.declare(source, members, clock.now_s())

        if engines_file:
            self.file = FileSource(Path(engines_file), lambda members: declare(FILE, members))
            self.file.load()
        if etcd is not None:
            self.etcd = EtcdSource(etcd, clock, lambda members: declare(ETCD, members))

    def runs(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run, each until it is cancelled."""
        found: list[Coroutine[Any, Any, None]] = []
        if self.file is not None:
            found.append(self.file.run(POLL_S))
        if self.etcd is not None:
            found.append(self.etcd.run())
        return found
