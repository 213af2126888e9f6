"""``kvkeep check determinism`` against fake engines in processes of their own."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.check import check
from kvkeep.validate import load, runner

pytestmark = pytest.mark.kvbm

SHORT = ("--max-iterations", "3", "--word-count", "60", "--max-tokens", "8", "--quiet")


@pytest.fixture
def start_all() -> Iterator[Callable[..., list[str]]]:
    """Starts fake engines and gives their addresses; they end with the test."""
    started: list[subprocess.Popen[str]] = []

    def launch(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "kvkeep.testing.fake_engine", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        urls: list[str] = json.loads(process.stdout.readline())["urls"]
        return urls

    yield launch
    for process in started:
        process.terminate()
        assert process.wait(10) == 0
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def start(start_all: Callable[..., list[str]]) -> Callable[..., str]:
    """Starts one fake engine and gives its address."""
    return lambda *arguments: start_all(*arguments)[0]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches them, and resets are not waited for."""
    for name in ("KVBM_MODEL_ID", "KVBM_SERVER_PORT", "KVBM_MAX_TOKENS", "KVBM_MAX_ITERATIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runner, "SETTLE_PAUSE_S", 0.0)
    monkeypatch.setattr(load, "RESET_PAUSE_S", 0.0)


def determinism(*arguments: str) -> Result:
    return CliRunner().invoke(check, ["determinism", *arguments])


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_a_right_stack_passes(start: Callable[..., str], tmp_path: Path) -> None:
    """Against a stack whose cache works the check passes with exit code 0 and a report."""
    url, path = start(), tmp_path / "report.json"

    result = determinism("--url", url, "--daemon-metrics", url, "--json", str(path), *SHORT)

    assert result.exit_code == 0, result.output
    run = report_of(path)["runs"][0]
    assert (run["outcome"], run["served"]["share"]) == ("passed", 1.0)
    assert {c["name"]: c["ok"] for c in run["checks"]}["first pass stores"] is True


def test_an_engine_alone_is_not_exercised(start: Callable[..., str], tmp_path: Path) -> None:
    """With kvkeep switched off the check says so and exits with 1."""
    path = tmp_path / "report.json"

    result = determinism("--url", start("--alone"), "--json", str(path), *SHORT)

    assert result.exit_code == 1
    assert report_of(path)["runs"][0]["outcome"] == "not-exercised"
    assert report_of(path)["passed"] is False


@pytest.mark.parametrize("fault", ["flip_every=2", "swap=1", "empty_every=7", "reset_lies=1"])
def test_a_planted_fault_fails(start: Callable[..., str], tmp_path: Path, fault: str) -> None:
    """A wrong block, another's block, empty answers and a lying reset each fail the check."""
    path = tmp_path / "report.json"

    result = determinism("--url", start("--fault", fault), "--json", str(path), *SHORT)

    assert result.exit_code == 1
    assert report_of(path)["runs"][0]["outcome"] == "failed"


def test_each_length_is_a_run(
    start: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of answer lengths is run one by one, also from the environment."""
    monkeypatch.setenv("KVBM_MAX_TOKENS", "4,8")
    monkeypatch.setenv("KVBM_MAX_ITERATIONS", "2")
    path = tmp_path / "report.json"

    result = determinism("--url", start(), "--json", str(path), "--quiet")

    assert result.exit_code == 0, result.output
    assert [run["sampling"]["max_tokens"] for run in report_of(path)["runs"]] == [4, 8]


def test_arms_are_compared(start: Callable[..., str], tmp_path: Path) -> None:
    """Arms can be named; the exact mode holds their answers to the bit."""
    path = tmp_path / "report.json"
    arguments = ["--arms", "cold,cached,reset", "--num-prompts", "3", "--exact"]

    result = determinism("--url", start(), *arguments, "--json", str(path), *SHORT)

    assert result.exit_code == 0, result.output
    arms = [arm["name"] for arm in report_of(path)["runs"][0]["arms"]]
    assert arms == ["cold", "fill", "cached", "reset"]


def test_the_table_shows_the_outcome(start: Callable[..., str]) -> None:
    """Without --quiet the terminal shows phases and the outcome."""
    result = determinism("--url", start(), *SHORT[:-1])

    assert "phase 2" in result.output
    assert result.output.rstrip().endswith("passed")


def test_a_reset_that_never_comes_fails_arms(start: Callable[..., str]) -> None:
    """An engine that refuses every reset fails the comparison, in one sentence."""
    url = start("--fault", "reset_refusals=-1")

    result = determinism("--url", url, "--arms", "cold,reset", "--num-prompts", "1", *SHORT)

    assert result.exit_code == 1
    assert "could not be reset" in result.stderr


def stack_of(urls: list[str], folder: Path) -> Path:
    """A stack file of engines that run already."""
    path = folder / "stack.yaml"
    engines = "".join(f"  - {{name: e{i}, url: '{url}'}}\n" for i, url in enumerate(urls))
    head = f"model: fake/model\nstate_dir: {folder}/state\ndaemon: {{enabled: false}}\n"
    path.write_text(f"{head}exact: true\nengines:\n{engines}")
    return path


def test_a_stack_file_is_checked(start_all: Callable[..., list[str]], tmp_path: Path) -> None:
    """A stack file names engines and exactness; its second engine is the other one."""
    stack, path = stack_of(start_all("--num-engines", "2"), tmp_path), tmp_path / "report.json"
    arguments = ["--arms", "cold,reset,other-engine", "--num-prompts", "3"]

    result = determinism("--stack", str(stack), *arguments, "--json", str(path), *SHORT)

    assert result.exit_code == 0, result.output
    run = report_of(path)["runs"][0]
    assert run["exact"] is True
    assert [arm["name"] for arm in run["arms"]] == ["cold", "fill", "reset", "other-engine"]


def test_a_stack_whose_engines_are_alone_is_not_exercised(
    start_all: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A stack file with kvkeep switched off ends with exit code 1."""
    stack, path = stack_of(start_all("--alone"), tmp_path), tmp_path / "report.json"

    result = determinism("--stack", str(stack), "--json", str(path), *SHORT)

    assert result.exit_code == 1
    assert report_of(path)["runs"][0]["outcome"] == "not-exercised"


def closed_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "http://127.0.0.1:{closed}"), "No server answers"),
        (("--url", "ftp://x"), "is no address"),
        (("--url", "{url}", "--stack", "s.yaml"), "either --stack or --url"),
        (("--url", "{url}", "--model-id", "other"), "does not serve 'other'"),
        (("--url", "{url}", "--max-tokens", "0"), "--max-tokens"),
        (("--url", "{url}", "--seed", "x"), "--seed"),
        (("--url", "{url}", "--arms", "warm"), "Unknown arms"),
        (("--url", "{url}", "--arms", "cold,restart"), "--stack"),
        (("--url", "{url}", "--num-prompts", "0"), "--num-prompts"),
        (("--url", "{url}", "--daemon-metrics", "http://127.0.0.1:{closed}"), "No kvkeep daemon"),
        (("--url", "{url}", "--shakespeare-url", "file:///no/such"), "can't be read"),
        (("--url", "{url}", "--small-url", "{url}"), "at most 128 blocks"),
        (("--stack", "no-such-file.yaml"), "no-such-file.yaml"),
        (("--daemon-metrics", "{url}"), "goes with --url"),
    ],
)
def test_bad_input_is_one_sentence(
    start: Callable[..., str], arguments: tuple[str, ...], said: str
) -> None:
    """Bad input ends with exit code 2 and one sentence on stderr, and nothing is judged."""
    url = start() if "{url}" in "".join(arguments) else ""
    filled = [part.format(url=url, closed=closed_port()) for part in arguments]

    result = determinism(*filled, "--quiet")

    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
