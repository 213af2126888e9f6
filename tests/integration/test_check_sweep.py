"""``kvkeep check tp-sweep`` over pairs that listen on real sockets and only pretend to compute."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.check import check
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.stack.spec import StackSpec
from kvkeep.testing.fake_engine import FakeEngine
from kvkeep.testing.fake_kv import Faults
from kvkeep.validate import load, runner
from kvkeep.validate.settings import ENVIRONMENT
from kvkeep.validate.started import Started
from kvkeep.validate.subject import Addresses
from kvkeep.validate.suite import fleets
from kvkeep.validate.suites import tp_sweep
from tests.unit.validate.suites.fake_pairs import FakePair

pytestmark = pytest.mark.kvbm


class Handler(BaseHTTPRequestHandler):
    """Hands a request to what answers it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: "Server"

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://pair{self.path}"
        reply = self.server.answer(httpx.Request(self.command, url, content=body))
        self.send_response(reply.status_code)
        self.send_header("Content-Type", reply.headers.get("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


class Server(ThreadingHTTPServer):
    """One address of a pair."""

    daemon_threads = False
    block_on_close = True

    def __init__(self, answer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer


def engine_answer(engine: FakeEngine) -> Any:
    def answer(request: httpx.Request) -> httpx.Response:
        reply = engine.handle(request.method, request.url.path, request.content)
        headers = {"Content-Type": reply.content_type}
        return httpx.Response(reply.status, headers=headers, content=reply.body)

    return answer


@contextlib.contextmanager
def serving(answer: Any) -> Iterator[str]:
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Machine:
    """Has pairs up in place of real stacks, by the sizes they have."""

    def __init__(self) -> None:
        self.started: list[tuple[int, ...]] = []
        self.fails: dict[tuple[int, ...], BaseException] = {}
        self.faults: dict[tuple[int, ...], Faults] = {}

    @contextlib.contextmanager
    def up(self, spec: StackSpec, *, quiet: bool) -> Iterator[Started]:
        sizes = tuple(engine.tensor_parallel for engine in spec.engines)
        self.started.append(sizes)
        if sizes in self.fails:
            raise self.fails[sizes]
        pair = FakePair(self.faults.get(sizes))
        with (
            serving(engine_answer(pair.prefill)) as prefill,
            serving(engine_answer(pair.decode)) as decode,
            serving(pair.answer) as router,
        ):
            parts = Addresses(decode, router=router, prefill=(prefill,), decode=(decode,))
            yield Started(parts, None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two cores, and no setting of the person who runs the tests."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runner, "SETTLE_PAUSE_S", 0.0)
    monkeypatch.setattr(load, "RESET_PAUSE_S", 0.0)
    monkeypatch.setattr(tp_sweep, "_room_here", lambda: tp_sweep.Room(2, None))
    machine = Machine()
    monkeypatch.setattr(fleets, "started_anew", machine.up)
    return machine


def sweep(path: Path, *more: str, prefill: str = "1,2", decode: str = "1") -> Result:
    sizes = ["--sweep-prefill-tp", prefill, "--sweep-decode-tp", decode]
    return CliRunner().invoke(check, ["tp-sweep", *sizes, "--json", str(path), *more])


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_a_sweep_is_told_as_a_matrix(machine: Machine, tmp_path: Path) -> None:
    """What passed, was refused and was left out, each with its reason; no refusal fails it."""
    path, page, junit = tmp_path / "r.json", tmp_path / "r.html", tmp_path / "r.xml"
    machine.fails = {(2, 1): InputError("engines[0].tensor_parallel = 2: 9 heads.")}

    result = sweep(path, "--html", str(page), "--junit", str(junit), decode="1,4")

    assert result.exit_code == 0, result.output
    report = report_of(path)
    assert report["matrix"] == {
        "TP 1": {"TP 4": "not-applicable", "TP 1": "passed"},
        "TP 2": {"TP 4": "not-applicable", "TP 1": "refused"},
    }
    reasons = {run["mode"]: run.get("reason", "") for run in report["runs"]}
    assert "9 heads" in reasons["TP 2 to TP 1"]
    assert "this machine has 2" in reasons["TP 1 to TP 4"]
    assert machine.started == [(1, 1), (2, 1)]
    assert "across" in result.output
    assert "Prefill engines by decode engines" in page.read_text()
    counted = ElementTree.parse(junit).getroot()
    assert (counted.get("failures"), counted.get("skipped")) == ("0", "3")


def test_one_wrong_pair_fails_the_sweep(machine: Machine, tmp_path: Path) -> None:
    """The others are judged all the same, and so is one that does not come up."""
    path = tmp_path / "r.json"
    machine.faults = {(1, 1): Faults(flip_every=3)}
    machine.fails = {(1, 2): UnavailableError("decode-0 was not ready after 300 s.")}

    result = sweep(path, "--quiet", decode="1,2")

    assert result.exit_code == 1
    assert report_of(path)["matrix"] == {
        "TP 1": {"TP 1": "failed", "TP 2": "failed"},
        "TP 2": {"TP 1": "passed", "TP 2": "passed"},
    }


def test_a_sweep_of_nothing_but_refusals_is_no_pass(machine: Machine, tmp_path: Path) -> None:
    """Nothing was shown."""
    machine.fails = {(1, 1): InputError("no"), (2, 1): InputError("no")}

    assert sweep(tmp_path / "r.json", "--quiet").exit_code == 1


def test_an_interrupted_sweep_goes_on(machine: Machine, tmp_path: Path) -> None:
    """Fleets that the report has are not started again; what was refused is asked anew."""
    path = tmp_path / "r.json"
    machine.fails = {(2, 1): KeyboardInterrupt()}
    assert sweep(path, "--quiet", decode="1,4").exit_code == 1
    assert [run["outcome"] for run in report_of(path)["runs"]] == [
        *["not-applicable"] * 2,
        "passed",
    ]
    machine.fails = {}

    result = sweep(path, "--quiet", "--resume", decode="1,4")

    assert result.exit_code == 0, result.output
    assert machine.started == [(1, 1), (2, 1), (2, 1)]
    assert report_of(path)["matrix"]["TP 2"] == {"TP 4": "not-applicable", "TP 1": "passed"}
    assert len(report_of(path)["runs"]) == 4


def test_addresses_cannot_be_swept(tmp_path: Path) -> None:
    """Engines that run already have the sizes they have."""
    with serving(engine_answer(FakeEngine())) as url:
        result = CliRunner().invoke(check, ["tp_config_sweep_test.sh", "--url", url])

    assert result.exit_code == 1
    assert "give a stack file" in " ".join(result.output.split())
