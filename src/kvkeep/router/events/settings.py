"""Where engines publish what happens to their blocks, as a person writes it down."""

from typing import Annotated

import msgspec

Place = Annotated[
    str, msgspec.Meta(max_length=256, pattern=r"^(tcp://[^\s]+:[^\s]+|nats://[^\s]+)?$")
]
Address = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^(tcp://[^\s]+:[^\s]+)?$")]


class EngineEvents(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where an engine publishes its block events."""

    publish: Place = ""
    """``endpoint`` of the engine's ``--kv-events-config`` as seen from the router, for example
    ``tcp://10.0.0.1:5557``; ``{host}`` stands for the engine's host. Or a NATS server,
    ``nats://HOST:4222``, to which ``kvkeep forward`` brings them. Empty: it does not publish."""
    replay: Address = ""
    """Its ``replay_endpoint``. Empty: lost events are not asked for again, and what was known of
    the engine is forgotten instead."""
    topic: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """Beginning of the topics to listen to. Of NATS the subject; empty: ``kvkeep.events.NAME``."""
    pool: Annotated[str, msgspec.Meta(max_length=256, pattern=r"^(ipc://\S+)?$")] = ""
    """``ipc://`` and the ``events_socket`` of the engine's daemon; the engine's connector then has
    ``announce_blocks``. Empty: what its daemon keeps is not known."""
    bind: bool = False
    """The engine connects to the router: it does so if its ``endpoint`` has no ``*``."""

    def __post_init__(self) -> None:
        if (self.replay or self.pool) and not self.publish:
            raise ValueError("replay or pool without publish: say where the events come from, too")
        if self.publish.startswith("nats://") and (self.replay or self.bind):
            raise ValueError("publish over NATS needs neither replay nor bind: leave them out")
