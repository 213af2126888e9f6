"""Where engines publish what happens to their blocks, as a person writes it down."""

from typing import Annotated

import msgspec

Address = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^(tcp://[^\s]+:[^\s]+)?$")]


class EngineEvents(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where an engine publishes its block events."""

    publish: Address = ""
    """``endpoint`` of the engine's ``--kv-events-config`` as seen from the router, for example
    ``tcp://10.0.0.1:5557``; ``{host}`` stands for the engine's host. Empty: it does not publish."""
    replay: Address = ""
    """Its ``replay_endpoint``. Empty: lost events are not asked for again, and what was known of
    the engine is forgotten instead."""
    topic: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """Beginning of the topics to listen to."""
    bind: bool = False
    """The engine connects to the router: it does so if its ``endpoint`` has no ``*``."""

    def __post_init__(self) -> None:
        if self.replay and not self.publish:
            raise ValueError("replay without publish: say where the events come from, too")
