"""Where engines publish what happens to their blocks, as a person writes it down."""

from typing import Annotated

import msgspec

Place = Annotated[
    str, msgspec.Meta(max_length=256, pattern=r"^(tcp://[^\s]+:[^\s]+|nats://[^\s]+)?$")
]
Address = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^(tcp://[^\s]+:[^\s]+)?$")]

RANKS_MAX = 1024
PORT_MAX = 65_535


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
    ranks: Annotated[int, msgspec.Meta(ge=1, le=RANKS_MAX)] = 1
    """Data-parallel ranks of the engine (vLLM's ``--data-parallel-size``): each of them publishes
    and replays at ports of its own, as far above the ones said as its number."""

    def __post_init__(self) -> None:
        if (self.replay or self.pool) and not self.publish:
            raise ValueError("replay or pool without publish: say where the events come from, too")
        if self.publish.startswith("nats://") and (self.replay or self.bind):
            raise ValueError("publish over NATS needs neither replay nor bind: leave them out")
        if self.ranks > 1:
            self._check_ranks()

    def _check_ranks(self) -> None:
        if self.publish.startswith("nats://"):
            raise ValueError(
                "ranks are followed where events come from: give --ranks to kvkeep forward"
            )
        ports = [_port_of(place) for place in (self.publish, self.replay) if place]
        if not ports or max(ports) + self.ranks - 1 > PORT_MAX:
            raise ValueError(
                f"ranks: {self.ranks} ranks have as many ports in a row: name the first with "
                f"publish, and see that the last is none above {PORT_MAX}"
            )
        if len(ports) == 2 and abs(ports[0] - ports[1]) < self.ranks:
            raise ValueError(
                f"ranks: the ports of {self.ranks} ranks overlap: let replay lie at least "
                f"{self.ranks} ports away from publish"
            )


def _port_of(place: str) -> int:
    port = place.rpartition(":")[2]
    if not (port.isascii() and port.isdigit() and len(port) <= 5):
        raise ValueError(f"ranks: {place} ends in no port, so those of further ranks can't be told")
    return int(port)
