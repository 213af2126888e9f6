"""Accepts connections on the control socket and turns messages into events.

One event loop, one thread. Nothing here waits: a message is answered in the call that read it.
"""

import asyncio
import itertools
import json
import logging
import os
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import cast

from kvkeep.core import effects as do
from kvkeep.core import events as on
from kvkeep.daemon.cartridges.residents import Resident
from kvkeep.daemon.metrics import Metrics
from kvkeep.daemon.misses import Misses
from kvkeep.daemon.movement.inspection import Inspection
from kvkeep.daemon.movement.movement import Movement
from kvkeep.daemon.movement.promotion import Wanted
from kvkeep.daemon.settings import DaemonSettings
from kvkeep.daemon.shell import Shell
from kvkeep.daemon.tier_settings import POOL
from kvkeep.model.clock import Clock
from kvkeep.model.errors import InputError, RefusedError, UnavailableError
from kvkeep.model.ids import CANARY_NAMESPACE, BlockHash, BlockKey, Holder, LeaseId, Namespace
from kvkeep.model.layout import KvLayout
from kvkeep.protocol import codec
from kvkeep.protocol import messages as m
from kvkeep.protocol.frames import FrameReader
from kvkeep.protocol.session import Session
from kvkeep.protocol.versions import SUPPORTED, VERSION

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
WRITE_BUFFER_BYTES_MAX = 8 << 20
"""A client that does not read its answers is cut off here."""
FOREVER_S = float("inf")
QUESTIONS_MAX = 4
"""About tiers, of people, at once: each may hold some 16 MiB and a thread."""
WAITS_MAX = 1024
"""Acquires of one session that wait at once; beyond it they get what the pool has."""
LEASE_SHARE_WAITED = 0.4
"""Of a lease, for blocks on their way: an answer at its half would come too late to be used."""


class Server:
    """Everything the sessions of one daemon share."""

    def __init__(
        self,
        settings: DaemonSettings,
        shell: Shell,
        clock: Clock,
        metrics: Metrics,
        movement: Movement,
    ) -> None:
        self.settings = settings
        self.shell = shell
        self.clock = clock
        self.metrics = metrics
        self.movement = movement
        self.inspection = Inspection(shell, movement)
        self.misses = Misses(shell, movement, clock)
        self.residents = metrics.residents
        self.sessions: set[SessionProtocol] = set()
        self.num_questions = 0
        """About tiers, that are being answered."""
        self._session_ids = itertools.count(1)

    def next_session_id(self) -> int:
        """A number no earlier session of this generation had."""
        return next(self._session_ids)

    def close(self) -> None:
        """Cut every session."""
        for session in list(self.sessions):
            session.abort()


class SessionProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._shell = server.shell
        self._frames = FrameReader()
        self._session = Session()
        self._transport: asyncio.Transport | None = None
        self._holder = Holder(0, 0)
        self._role = ""
        self._engine_id = ""
        self._waits: set[asyncio.Task[None]] = set()
        """Acquires that wait for blocks of lower tiers, and questions about tiers."""

    # ---- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Check who it is before reading a byte."""
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("socket")
        data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(data)
        self._holder = Holder(self._server.next_session_id(), pid)
        self._server.sessions.add(self)
        self._server.metrics.num_sessions = len(self._server.sessions)
        if uid not in (0, os.getuid()):
            self._refuse(f"this daemon serves user {os.getuid()} only: run as that user")
        elif len(self._server.sessions) > self._server.settings.sessions_max:
            self._refuse("too many sessions: raise sessions_max or stop an engine")

    def data_received(self, data: bytes) -> None:
        """Answer every message that these bytes complete."""
        if self._transport is None or self._transport.is_closing():
            return
        try:
            for payload in self._frames.feed(data):
                self._receive(codec.decode_to_daemon(payload))
                if self._transport.is_closing():
                    return
        except (InputError, RefusedError) as error:
            self._server.metrics.count("messages_refused")
            log.warning("session refused. pid=%d reason=%s", self._holder.pid, error)
            self._refuse(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Take back what the session held."""
        self._server.sessions.discard(self)
        self._server.metrics.num_sessions = len(self._server.sessions)
        if self._role == "worker":
            self._shell.num_workers -= 1
        for task in self._waits:
            task.cancel()
        self._shell.handle(on.HolderLeft(self._holder))
        self._transport = None

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    # ---- messages

    def _send(self, message: m.Message) -> None:
        assert self._transport is not None
        if self._transport.get_write_buffer_size() > WRITE_BUFFER_BYTES_MAX:
            self._server.metrics.count("sessions_cut")
            log.warning("client does not read its answers. pid=%d", self._holder.pid)
            self._transport.abort()
            return
        self._transport.write(codec.encode(message))

    def _refuse(self, reason: str) -> None:
        assert self._transport is not None
        self._send(m.Refused(reason[: m.TEXT_MAX]))
        self._transport.close()

    def _receive(self, message: m.ToDaemon) -> None:
        self._session.receive(message)
        match message:
            case m.Acquire():
                self._acquire(message)
            case m.Release():
                self._release(message)
            case m.Reserve():
                self._reserve(message)
            case m.Commit():
                self._commit(message)
            case m.ReportCorrupt():
                self._report_corrupt(message)
            case m.ReportHandoff():
                self._server.metrics.handed_over(
                    message.outcome, message.num_missed, message.wait_us
                )
            case m.Hello():
                self._hello(message)
            case m.Ping():
                self._send(m.Pong(message.request_id))
            case m.GetStatus():
                self._send(m.Status(message.request_id, self._server.metrics.status_text()))
            case m.Clear():
                self._clear(message)
            case m.ListKeys():
                self._begin_telling(message.request_id, self._list_keys(message))
            case m.VerifyTier():
                found = self._server.inspection.verify(message.tier)
                self._begin_telling(message.request_id, found)
            case m.ClearTiers():
                self._begin_telling(message.request_id, self._clear_tiers(message))
            case m.Explain():
                self._explain(message)
            case m.Prefetch():
                self._prefetch(message)
            case m.KeepCartridge():
                self._keep_cartridge(message)
            case m.DropCartridge():
                self._drop_cartridge(message)

    def _deadline_s(self, lease_s: float) -> float:
        lease_s_max = self._server.settings.lease_s_max
        if lease_s > lease_s_max:
            # A shorter lease than it asked for would leave the client reading what is not lent.
            raise RefusedError(
                f"a lease of {lease_s} s was asked for and lease_s_max is {lease_s_max}: "
                "raise lease_s_max of the daemon, or lower lease_s of the engine"
            )
        return self._server.clock.now_s() + lease_s

    def _hello(self, message: m.Hello) -> None:
        if message.version not in SUPPORTED:
            raise RefusedError(
                f"client speaks protocol {message.version}, this daemon {VERSION}: "
                "install the same kvkeep on both sides"
            )
        canary_slot = 0
        self._session_role(message)
        if message.namespace is not None:
            identity = {part.name: part.value for part in message.identity}
            self._server.misses.announced(Namespace(message.namespace), identity)
        if message.layout is not None:
            canary_slot = self._lend_canary_slot()
        geometry = self._shell.pool.geometry
        self._send(
            m.Welcome(
                version=VERSION,
                generation=self._shell.pool.generation,
                pool_path=str(self._shell.pool.path),
                pool_id=self._shell.pool.pool_id,
                num_slots=0 if geometry is None else geometry.num_slots,
                canary_slot=canary_slot,
                lease_s_max=self._server.settings.lease_s_max,
            )
        )
        log.info("session opened. role=%s engine=%s pid=%d", message.role, message.engine_id,
                 self._holder.pid)  # fmt: skip

    def _session_role(self, message: m.Hello) -> None:
        self._engine_id = message.engine_id
        if message.layout is None:
            return
        self._shell.open_layout(_layout(message.layout))
        self._server.movement.follow()
        self._role = "worker"
        self._shell.num_workers += 1
        self._shell.greeted(
            self._holder, self._engine_id, is_for_process=self._speaks_for_process()
        )

    def _speaks_for_process(self) -> bool:
        """Whether this worker's greeting proves that no copy of its process is in motion.

        It does not where the process holds a worker of another engine, nor where the kernel
        could not name the process, because it lives in a process namespace of its own.
        """
        pid = self._holder.pid
        return pid != 0 and not any(
            other.is_worker_of(pid) and other._engine_id != self._engine_id
            for other in self._server.sessions
        )

    def is_worker_of(self, pid: int) -> bool:
        """Whether this is a worker's session, of that process."""
        return self._role == "worker" and self._holder.pid == pid

    def _lend_canary_slot(self) -> int:
        node = self._shell.node
        assert node is not None
        event = on.StoreAsked(
            0, self._holder, CANARY_NAMESPACE, 0, [BlockHash(secrets.token_bytes(32))],
            node.ledger.all_heads, FOREVER_S,
        )  # fmt: skip
        reply = self._shell.handle(event)
        assert isinstance(reply, do.ReplyStore)
        if not reply.lease_id:
            raise RefusedError("every slot of the pool is in use: raise pool_bytes")
        return reply.slots[0]

    def _acquire(self, message: m.Acquire) -> None:
        deadline_s = self._deadline_s(message.lease_s)
        wanted = Wanted(
            Namespace(message.namespace),
            message.group_idx,
            codec.split_hashes(message.hashes),
            message.prefill_tokens_s,
        )
        reply = self._lend(wanted, deadline_s)
        if (
            reply is None
            or len(self._waits) >= WAITS_MAX
            or not self._server.movement.may_come(wanted, len(reply.slots))
        ):
            self._send_acquired(message, wanted, reply)
            return
        # The blocks it may have at once stay where they are, but are lent with the others only.
        self._begin(self._acquire_later(message, wanted, reply))

    def _begin(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        """Do what takes time beside other messages, as long as the session lasts."""
        task = asyncio.get_running_loop().create_task(work)
        self._waits.add(task)
        task.add_done_callback(self._waited)
        return task

    def _lend(
        self, wanted: Wanted, deadline_s: float, first: do.ReplyRead | None = None
    ) -> do.ReplyRead | None:
        """Lend what is readable, in the place of what was lent for the same question first."""
        asked = (0, self._holder, wanted.namespace, wanted.group_idx, wanted.hashes, deadline_s)
        reply = self._shell.handle(
            on.ReadAsked(*asked) if first is None else on.ReadAskedAgain(*asked, first.lease_id)
        )
        return reply if isinstance(reply, do.ReplyRead) else None

    def _send_acquired(
        self, message: m.Acquire, wanted: Wanted, reply: do.ReplyRead | None
    ) -> None:
        generation, num_lent = self._shell.pool.generation, 0
        if reply is None:
            self._send(m.Acquired(message.request_id, 0, b"", generation))
        else:
            num_lent, slots = len(reply.slots), codec.join_slots(reply.slots)
            self._send(m.Acquired(message.request_id, reply.lease_id, slots, generation))
        if num_lent:
            self._server.movement.used(wanted, num_lent)
        # After the answer is on its way.
        request = message.engine_request
        self._server.misses.answered(wanted, num_lent, self._engine_id, request)

    async def _acquire_later(self, message: m.Acquire, wanted: Wanted, first: do.ReplyRead) -> None:
        """Answer once blocks of lower tiers have come, or it is time."""
        generation = self._shell.pool.generation

        def announce(limit_s: float) -> None:
            if self._transport is not None and not self._transport.is_closing():
                wait_us = int(limit_s * 1e6) + 1
                self._send(m.Acquired(message.request_id, 0, b"", generation, wait_us))

        # A client counts its lease from the question, and leaves half of it for the load.
        limit_s = LEASE_SHARE_WAITED * message.lease_s
        await self._server.movement.bring(wanted, announce, limit_s)
        if self._transport is not None and not self._transport.is_closing():
            reply = self._lend(wanted, self._deadline_s(message.lease_s), first)
            self._send_acquired(message, wanted, reply)

    def _waited(self, task: "asyncio.Task[None]") -> None:
        self._waits.discard(task)
        if not task.cancelled():
            task.result()  # a defect of the core ends the daemon, in the loop's handler

    def _prefetch(self, message: m.Prefetch) -> None:
        wanted = Wanted(
            Namespace(message.namespace),
            message.group_idx,
            codec.split_hashes(message.hashes),
            message.prefill_tokens_s,
        )
        num_accepted = self._server.movement.prefetch(wanted)
        self._send(m.Prefetching(message.request_id, num_accepted))

    def _release(self, message: m.Release) -> None:
        leases = [LeaseId(lease_id) for lease_id in message.lease_ids]
        self._shell.handle(on.ReadFinished(self._holder, leases))
        self._server.metrics.loaded(
            message.num_loaded, message.num_failed, message.load_us, message.num_declined
        )
        self._server.movement.loaded(message.num_loaded, message.load_us)

    def _report_corrupt(self, message: m.ReportCorrupt) -> None:
        hashes, namespace = codec.split_hashes(message.hashes), Namespace(message.namespace)
        self._shell.handle(on.BlocksFoundCorrupt(namespace, message.group_idx, hashes))
        keys = [BlockKey(namespace, h, message.group_idx) for h in dict.fromkeys(hashes)]
        self._server.movement.corrupt(keys)
        self._server.misses.rotten(keys)

    def _reserve(self, message: m.Reserve) -> None:
        hashes = codec.split_hashes(message.hashes)
        node = self._shell.node
        mask = ((1 << message.num_heads) - 1) << message.first_head
        if node is None or not mask or mask & ~node.ledger.all_heads:
            raise InputError("heads out of range: a worker says Hello with its layout first")
        if message.namespace == CANARY_NAMESPACE:
            raise InputError("this namespace is the canaries' own: store under another")
        reply = self._shell.handle(
            on.StoreAsked(
                0,
                self._holder,
                Namespace(message.namespace),
                message.group_idx,
                hashes,
                mask,
                self._deadline_s(message.lease_s),
            )
        )
        assert isinstance(reply, do.ReplyStore)
        slots = codec.join_slots(reply.slots)
        self._send(m.Reserved(message.request_id, reply.lease_id, slots))

    def _commit(self, message: m.Commit) -> None:
        is_stored = [flag == 1 for flag in message.is_stored]
        reply = self._shell.handle(
            on.StoreFinished(0, self._holder, LeaseId(message.lease_id), is_stored)
        )
        ready_keys = self._shell.ready_keys
        num_ready = reply.num_ready if isinstance(reply, do.ReplyStored) else 0
        is_fenced = not isinstance(reply, do.ReplyStored) or reply.is_fenced
        self._server.metrics.stored(num_ready, message.store_us)
        self._send(m.Committed(message.request_id, num_ready, is_fenced))
        # After the answer is on its way: admission looks at each block.
        self._server.misses.stored(ready_keys)
        self._server.movement.stored(ready_keys)

    def _clear(self, message: m.Clear) -> None:
        reply = self._shell.handle(on.ClearAsked(0))
        cleared, kept = (
            (reply.num_cleared, reply.num_kept) if isinstance(reply, do.ReplyCleared) else (0, 0)
        )
        self._send(m.Cleared(message.request_id, cleared, kept))
        self._server.misses.cleared()
        self._server.residents.cleared()

    # ---- questions of people

    def _tell(self, request_id: int, part: Mapping[str, object], *, is_last: bool = True) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._send(m.Told(request_id, is_last, json.dumps(part)))

    def _begin_telling(self, request_id: int, parts: AsyncIterator[Mapping[str, object]]) -> None:
        if self._server.num_questions >= QUESTIONS_MAX:
            self._tell(request_id, {"error": "others are asking about tiers: try again later"})
            return
        self._server.num_questions += 1
        self._begin(self._tell_all(request_id, parts)).add_done_callback(self._told)

    def _told(self, _task: "asyncio.Task[None]") -> None:
        self._server.num_questions -= 1

    async def _tell_all(self, request_id: int, parts: AsyncIterator[Mapping[str, object]]) -> None:
        """Pass on each piece of an answer when it is there; an error ends it, in words."""
        end: Mapping[str, object] = {"is_done": True}
        try:
            async for part in parts:
                self._tell(request_id, part, is_last=False)
        except (InputError, UnavailableError) as error:
            end = {"error": str(error)}
        self._tell(request_id, end)

    async def _list_keys(self, message: m.ListKeys) -> AsyncIterator[Mapping[str, object]]:
        namespace = None if message.namespace is None else Namespace(message.namespace)
        yield await self._server.inspection.keys(message.tier, namespace, message.limit)

    async def _clear_tiers(self, message: m.ClearTiers) -> AsyncIterator[Mapping[str, object]]:
        async for part in self._server.inspection.clear(message.tiers):
            if part["tier"] == POOL:
                self._server.misses.cleared()
                self._server.residents.cleared()
            yield part

    def _keep_cartridge(self, message: m.KeepCartridge) -> None:
        hashes = codec.split_hashes(message.hashes)
        told = Resident(
            message.cartridge_id,
            message.digest,
            Namespace(message.namespace),
            message.group_idx,
            hashes,
        )
        self._server.residents.keep(told, is_pinned=message.is_pinned)

    def _drop_cartridge(self, message: m.DropCartridge) -> None:
        try:
            num_blocks = self._server.residents.drop(
                message.cartridge_id, is_forced=message.is_forced
            )
        except (InputError, RefusedError) as error:
            self._tell(message.request_id, {"error": str(error)})
            return
        self._tell(message.request_id, {"dropped": num_blocks})

    def _explain(self, message: m.Explain) -> None:
        misses = self._server.misses
        if message.namespace is not None:
            hashes = codec.split_hashes(message.hashes)
            namespace = Namespace(message.namespace)
            part = misses.explain_prefix(namespace, message.group_idx, hashes)
        else:
            part = misses.explain_request(message.engine_request or "")
        self._tell(message.request_id, part)


def _layout(wire: m.Layout) -> KvLayout:
    return KvLayout(*(getattr(wire, name) for name in wire.__struct_fields__))
