"""Stacks under a real supervisor and a real router whose engines only pretend.

An engine looks for files beside it: ``NAME.broken`` keeps it from starting, ``NAME.slow`` from
answering, and ``NAME.hold`` holds back answers to the prompt ``hold``. It adds its pid to
``NAME.starts``. Run as a program it is what `kvkeep up` is, for a stack in JSON.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from kvkeep.cli import up
from kvkeep.stack.engines import Launch, Placement
from kvkeep.stack.precedence import make_spec
from kvkeep.stack.spec import EngineSpec
from kvkeep.stack.supervisor import Stack
from tests.waiting import HANG_S

ROOT = Path(__file__).parent.parent.parent
STOP_TIMEOUT_S = 90.0
ENGINE = """
import http.server, json, os, sys, time
port, name, model = int(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(f"{name}.starts", "a") as starts:
    starts.write(f"{os.getpid()}\\n")
if os.path.exists(f"{name}.broken"):
    raise ValueError("this engine is broken")
print("Starting to load model", flush=True)

def wait_while(file):
    while os.path.exists(file):
        time.sleep(0.02)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self): self.answer({"data": [{"id": model, "object": "model"}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if asked.get("prompt") == "hold":
            open(f"{name}.holds", "w").close()
            wait_while(f"{name}.hold")
        text = {"model": model, "choices": [{"text": f"{os.getpid()}", "finish_reason": "length"}]}
        self.answer(text)
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_): pass

wait_while(f"{name}.slow")
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def launch(engine: EngineSpec, placement: Placement) -> Launch:
    model = placement.spec.served_name_of(engine)
    command = [sys.executable, "-c", ENGINE, str(placement.port), engine.name, model]
    return Launch(command=command, environment=dict(os.environ), shares_port=True)


class UpStack:
    """A stack that somebody keeps up."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvkeep-test-"))
        model = self.folder / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        self.state = self.folder / "state"
        self.state.mkdir()
        own = {"name": "s", "model": str(model), "state_dir": str(self.state)}
        self.values = own | {"start_timeout_s": 90, "daemon": {"enabled": False}} | values
        self._process: subprocess.Popen[str] | None = None
        self._log = (self.folder / "log").open("wb")
        self.told: dict[str, Any] = {}

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.integration.fake_stacks", json.dumps(self.values)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log_text()
        self.told = json.loads(line)

    def log_text(self) -> str:
        """What the supervisor said, and its router after it."""
        router = self.state / "logs" / "router.log"
        texts = [path.read_text() for path in (self.folder / "log", router) if path.exists()]
        return "\n".join(texts)

    @property
    def url(self) -> str:
        return str(self.told["router"]["url"])

    def ask(self, model: str | None = None, prompt: str = "x") -> httpx.Response:
        named = {} if model is None else {"model": model}
        body = {**named, "prompt": prompt, "max_tokens": 1}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120, trust_env=False)

    def workers(self) -> dict[str, Any]:
        url = f"{self.told['router']['admin_url']}/workers"
        found: dict[str, Any] = (
            httpx.get(url, trust_env=False, timeout=HANG_S).raise_for_status().json()
        )
        return found

    def states(self) -> dict[str, str]:
        """Of engines on demand."""
        return {each["name"]: each["state"] for each in self.workers()["on_demand"]}

    def starts(self, engine: str) -> list[int]:
        """Pids of every start of an engine."""
        try:
            return [int(line) for line in (self.state / f"{engine}.starts").read_text().split()]
        except FileNotFoundError:
            return []

    def file(self, name: str) -> Path:
        """One of the files that engines look for."""
        return self.state / name

    def tell_stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(STOP_TIMEOUT_S)

    def stop(self) -> int:
        """Stop it if it runs; returns the exit code."""
        if self._process is None:
            return 0
        for held in [*self.state.glob("*.hold"), *self.state.glob("*.slow")]:
            held.unlink()
        if self._process.poll() is None:
            self.tell_stop()
        try:
            return self.wait()
        finally:
            self._process.kill()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._log.close()


@contextlib.contextmanager
def up_stack(values: dict[str, Any], *files: str) -> Iterator[UpStack]:
    """A stack that is up, with some of the files that engines look for."""
    stack = UpStack(values)
    for name in files:
        stack.file(name).touch()
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


if __name__ == "__main__":
    vars(up)["Stack"] = functools.partial(Stack, launcher=launch)
    spec = make_spec(json.loads(sys.argv[1]), environment={})
    sys.exit(up._run(spec, as_json=True, quiet=True))
