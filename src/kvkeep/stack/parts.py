"""The daemon and the engines of a running stack, as whoever runs the stack meets them.

Blocking; one thread at a time may use a part. A part tells its stack when it changed, so that the
stack's record stays true.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import UnavailableError
from kvkeep.stack.engines import Launch
from kvkeep.stack.machine import is_port_free
from kvkeep.stack.process import POLL_S, StackProcess
from kvkeep.stack.progress import Progress
from kvkeep.stack.readiness import (
    Ready,
    complete_one_token,
    find_ready_line,
    is_healthy,
    make_client,
)

DOING = (
    # What vLLM logs as it goes on (vllm 0.32), latest first.
    ("Application startup complete", "waiting for a first token"),
    ("KV cache size", "getting ready"),
    ("Starting to load model", "loading the model"),
    ("Initializing a V1 LLM engine", "starting the engine"),
)
PROBE_EVERY_S = 0.25
SAY_EVERY_S = 0.5
"""What an engine does is read off its log, which costs more than a look at its process."""

Changed = Callable[[], None]


class Part(Protocol):
    """Something that is started and then becomes ready."""

    name: str
    title: str
    """Its name for a person."""

    @property
    def process(self) -> StackProcess | None:
        """Its process; None for an engine that runs already."""
        ...

    def is_ready(self) -> bool:
        """Ask whether it is ready; quick."""
        ...

    def doing(self) -> str:
        """What it does until then."""
        ...


class Stoppable(Part, Protocol):
    """A part that can be ended by itself."""

    def stop(self) -> None:
        """End it. Idempotent."""
        ...


class Restartable(Stoppable, Protocol):
    """A part that is started again when it ends, while the others go on without it."""

    def begin_again(self) -> None:
        """End what is left of it and start it; `is_restarted` tells when it is ready."""
        ...

    def is_restarted(self) -> bool:
        """Ask whether it is ready after `begin_again`; quick."""
        ...


def start_process(process: StackProcess, launch: Launch, folder: Path) -> None:
    """Write the files of a launch and start it in their folder.

    Raises:
        UnavailableError: It can't be started; nothing runs.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in launch.files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise UnavailableError(
            f"{process.name} can't be started: {error.filename} can't be written "
            f"({error.strerror})."
        ) from error
    process.start(launch.command, environment=launch.environment, folder=folder)


class RestartedPart(ABC):
    """How a part of its own process is started again without waiting for it."""

    name: str
    title: str
    process: StackProcess

    def __init__(self, start_timeout_s: float, changed: Changed) -> None:
        self._start_timeout_s, self._changed = start_timeout_s, changed
        self._begun_s = 0.0

    @abstractmethod
    def begin(self) -> None:
        """Start it."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it serves since its start."""

    @abstractmethod
    def doing(self) -> str:
        """What it does until then."""

    @abstractmethod
    def stop(self) -> None:
        """End it. Idempotent."""

    def begin_again(self) -> None:
        """End what is left of it and start it; `is_restarted` tells when it is ready."""
        self.stop()
        self.begin()
        self._begun_s = SystemClock().now_s()

    def is_restarted(self) -> bool:
        """Ask whether it is ready after `begin_again`; quick.

        Raises:
            UnavailableError: It ended, or was not ready in time; it is stopped.
        """
        if not is_ready_in_time(self, self._begun_s, self._start_timeout_s):
            return False
        self._changed()
        return True


class DaemonPart(RestartedPart):
    """The stack's daemon."""

    def __init__(
        self,
        launch: Callable[[int | None], Launch],
        folder: Path,
        *,
        start_timeout_s: float,
        changed: Changed,
    ) -> None:
        """Prepare a daemon.

        Args:
            launch: Makes its command, given the metrics port it must take, or None.
            folder: The stack's state folder.
            start_timeout_s: Longest wait for it to be ready, in seconds.
            changed: Called when a process was started or ended.
        """
        self.name = self.title = "daemon"
        self.process: StackProcess = StackProcess(self.name, folder / "logs" / "daemon.log")
        super().__init__(start_timeout_s, changed)
        self._launch, self._folder = launch, folder
        self._ready: Ready | None = None

    @property
    def pid(self) -> int:
        """The daemon's own pid."""
        return self.process.pid

    @property
    def log(self) -> Path:
        """Its output."""
        return self.process.log

    @property
    def socket(self) -> str:
        """Path of its control socket."""
        return self._said.socket

    @property
    def metrics_url(self) -> str:
        """Address of /metrics and /status, without a path."""
        return f"http://127.0.0.1:{self._said.metrics_port}"

    @property
    def pool(self) -> str:
        """Path of the pool."""
        return self._said.pool

    @property
    def _said(self) -> Ready:
        assert self._ready is not None, "the daemon has not been ready yet"
        return self._ready

    @property
    def was_ready(self) -> bool:
        """Whether its addresses are known."""
        return self._ready is not None

    def begin(self) -> None:
        """Start it; `await_ready` waits for it.

        A second start takes the metrics port it had before, unless another program has it now:
        then the port that the stack file names, or else any free one.
        """
        port = self._ready.metrics_port if self._ready else None
        if port is not None and not is_port_free(port):
            port = None
        start_process(self.process, self._launch(port), self._folder)
        self._changed()

    def is_ready(self) -> bool:
        """Whether it announced itself since its start."""
        said = find_ready_line(self.process.new_output())
        if said is None:
            return False
        self._ready = said
        return True

    def doing(self) -> str:
        """What it does until it is ready."""
        return "opening the pool"

    def restart(self) -> None:
        """Stop it and start it again on the same pool, socket and port; returns when ready.

        Raises:
            UnavailableError: It did not become ready; it is stopped.
        """
        self.begin_again()
        try:
            await_ready([self], self._start_timeout_s)
        except UnavailableError:
            self.stop()
            raise
        self._changed()

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self.process.kill()
        self._changed()

    def stop(self) -> None:
        """End it well; its pool stays. Idempotent."""
        self.process.stop()


class EnginePart:
    """One engine of the stack."""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        model: str | None,
        start_timeout_s: float,
        changed: Changed,
    ) -> None:
        """Name an engine that runs already; `will_start` makes it one that is started here.

        Args:
            name: The stack's name for it.
            url: Address, without a path.
            model: Name to ask for; None takes the first that is served.
            start_timeout_s: Longest wait for it to be ready, in seconds.
            changed: Called when its process was started or ended.
        """
        self.name, self.url = name, url.rstrip("/")
        self.title = f"engine {name}"
        self.process: StackProcess | None = None
        self._model = model
        self._start_timeout_s, self._changed = start_timeout_s, changed
        self._launch: Callable[[], Launch] | None = None
        self._folder = Path()
        self._probed_s = self._begun_s = 0.0

    def will_start(self, launch: Callable[[], Launch], folder: Path) -> None:
        """Make it an engine that `begin` starts."""
        self.process = StackProcess(self.title, folder / "logs" / f"{self.name}.log")
        self._launch, self._folder = launch, folder

    @property
    def pid(self) -> int:
        """Pid of the engine's HTTP process.

        Raises:
            UnavailableError: The engine ran already, so its pid is not known.
        """
        return self._own_process().pid

    @property
    def log(self) -> Path:
        """Its output."""
        return self._own_process().log

    def _own_process(self) -> StackProcess:
        if self.process is None:
            raise UnavailableError(f"engine {self.name} was not started by this stack.")
        return self.process

    def begin(self) -> None:
        """Start it, if it is ours to start; `await_ready` waits for it."""
        if self._launch is not None:
            self._begun_s = SystemClock().now_s()
            start_process(self._own_process(), self._launch(), self._folder)
            self._changed()

    def begin_again(self) -> None:
        """End what is left of it and start it; `is_restarted` tells when it is ready."""
        self._own_process().stop()
        self.begin()

    def is_restarted(self) -> bool:
        """Ask whether it is ready after `begin` or `begin_again`; quick.

        Raises:
            UnavailableError: It ended, or was not ready in time; it is stopped.
        """
        if not is_ready_in_time(self, self._begun_s, self._start_timeout_s):
            return False
        self._changed()
        return True

    def is_ready(self) -> bool:
        """Whether it is healthy and gave a token; asked every ``PROBE_EVERY_S`` at most."""
        now_s = SystemClock().now_s()
        if now_s - self._probed_s < PROBE_EVERY_S:
            return False
        self._probed_s = now_s
        with make_client(self.url) as client:
            if not is_healthy(client, self.url):
                return False
            complete_one_token(client, self.url, self._model)
        return True

    def doing(self) -> str:
        """How far it has come, by its log."""
        if self.process is None:
            return f"waiting for {self.url}"
        text = self.process.new_output().decode(errors="replace")
        return next((doing for mark, doing in DOING if mark in text), "loading libraries")

    def restart(self) -> None:
        """Stop it and start it again on the same port; returns when it gave a token.

        Raises:
            UnavailableError: It is not ours, or did not become ready; then it is stopped.
        """
        self._own_process().stop()
        self.begin()
        try:
            await_ready([self], self._start_timeout_s)
        except UnavailableError:
            self.stop()
            raise
        self._changed()

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self._own_process().kill()
        self._changed()

    def stop(self) -> None:
        """End it well, if it is ours. Idempotent."""
        if self.process is not None:
            self.process.stop()

    def ask_stop(self) -> None:
        """Begin to end it; `is_gone` tells when that is done."""
        self._own_process().ask_stop()

    def is_gone(self) -> bool:
        """Whether nothing of its process is left."""
        return self._own_process().is_gone()

    def is_running(self) -> bool:
        """Whether its process runs."""
        return self._own_process().is_running()

    def why_failed(self) -> str:
        """The most telling thing it wrote."""
        return self._own_process().why_failed()


def await_ready(
    parts: Sequence[Part],
    timeout_s: float,
    progress: Progress | None = None,
    said: Callable[[str, str], None] = lambda name, doing: None,
) -> None:
    """Wait until every part is ready.

    Args:
        parts: All started already.
        timeout_s: Longest wait, in seconds.
        progress: Where to show how far each is.
        said: Told each part's name and what it does, when that changes.

    Raises:
        UnavailableError: A part ended, or was not ready in time; what runs is the caller's to stop.
    """
    progress = progress or Progress(quiet=True)
    clock = SystemClock()
    begun_s = clock.now_s()
    with contextlib.ExitStack() as shown, progress:
        tasks = [(part, shown.enter_context(progress.task(part.title))) for part in parts]
        said_s = -SAY_EVERY_S
        while tasks:
            is_time_to_say = clock.now_s() - said_s >= SAY_EVERY_S
            for part, task in tuple(tasks):
                if _is_done(part):
                    said(part.name, "ready")
                    task.finish(f"ready after {clock.now_s() - begun_s:.1f} s")
                    tasks.remove((part, task))
                elif is_time_to_say and task.say(doing := part.doing()):
                    said(part.name, doing)
            if is_time_to_say:
                said_s = clock.now_s()
            if tasks and clock.now_s() > begun_s + timeout_s:
                raise UnavailableError(_too_late(tasks[0][0], timeout_s))
            if tasks:
                time.sleep(POLL_S)


def is_ready_in_time(part: "Stoppable", begun_s: float, timeout_s: float) -> bool:
    """Ask whether a part that was started at ``begun_s`` is ready; quick.

    Raises:
        UnavailableError: It ended, or was not ready in time; it is stopped.
    """
    if _is_done(part):
        return True
    if SystemClock().now_s() > begun_s + timeout_s:
        late = UnavailableError(_too_late(part, timeout_s))
        part.stop()
        raise late
    return False


def _too_late(part: Part, timeout_s: float) -> str:
    why = f"there is no answer at {part.title}"
    if part.process is not None:
        why = part.process.why_failed()
    return (
        f"{part.title} was not ready after {timeout_s:g} s ({part.doing()}); "
        f"raise start_timeout_s, or mend: {why}"
    )


def _is_done(part: Part) -> bool:
    # Asked before whether it is ready: an answer may come from another program on its port.
    if part.process is not None and not part.process.is_running():
        why = part.process.why_failed()
        part.process.stop()
        raise UnavailableError(f"{part.title} ended while it started: {why}")
    return part.is_ready()
