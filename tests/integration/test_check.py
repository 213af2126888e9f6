"""``kvkeep check`` against fake engines in processes of their own."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.check import check
from kvkeep.validate import load, runner
from kvkeep.validate.settings import ENVIRONMENT
from kvkeep.validate.suite.registry import suites
from tests.waiting import HANG_S

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
        assert process.wait(HANG_S) == 0
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def start(start_all: Callable[..., list[str]]) -> Callable[..., str]:
    """Starts one fake engine and gives its address."""
    return lambda *arguments: start_all(*arguments)[0]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches them, and resets are not waited for."""
    for name in ENVIRONMENT:
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


def test_every_form_that_is_asked_for_is_written(start: Callable[..., str], tmp_path: Path) -> None:
    """The same run as JSON, as a page and as a CI reads it."""
    url, page, junit = start(), tmp_path / "r.html", tmp_path / "r.xml"

    result = determinism("--url", url, "--html", str(page), "--junit", str(junit), *SHORT)

    assert result.exit_code == 0, result.output
    assert "kvkeep check: passed" in page.read_text()
    assert ElementTree.parse(junit).getroot().get("failures") == "0"


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


def run_check(*arguments: str) -> Result:
    return CliRunner().invoke(check, arguments)


def test_list_explains_every_suite() -> None:
    """Each suite says what it proves and needs, and the groups what they are about."""
    result = run_check("list")

    assert result.exit_code == 0
    for suite in suites():
        assert suite.name in result.output
        assert suite.proves in " ".join(result.output.split())
    assert "stress: many requests" in result.output


def test_a_suite_has_the_documents_name(start: Callable[..., str]) -> None:
    """A suite runs under the name of the document's file, too."""
    result = run_check("test_generation_flow.py", "--url", start(), "--quiet")

    assert result.exit_code == 0, result.output


def test_a_group_runs_what_applies(start: Callable[..., str], tmp_path: Path) -> None:
    """A group's suites run in order; one that does not apply is said, and is no failure."""
    path, url = tmp_path / "report.json", start()
    few = ["--ifeval-prompts", "6", "--max-iterations", "2", "--max-tokens", "6"]

    result = run_check(
        "quick", "--url", url, "--daemon-metrics", url, "--json", str(path), *few, "--quiet"
    )

    assert result.exit_code == 0, result.output
    outcomes = [(run["suite"], run["outcome"]) for run in report_of(path)["runs"]]
    assert outcomes == [
        ("generation", "passed"),
        ("routing", "not-applicable"),
        ("locality", "not-applicable"),
        ("determinism", "passed"),
        ("determinism-concurrent", "passed"),
        ("determinism-concurrent", "passed"),
        ("pd-accuracy", "not-applicable"),
    ]
    assert {run["scale"] for run in report_of(path)["runs"] if "scale" in run} == {"small"}


def test_an_interrupted_group_goes_on(start: Callable[..., str], tmp_path: Path) -> None:
    """Suites that the report file has are not run again."""
    path, url = tmp_path / "report.json", start()
    begun = {"suite": "determinism", "outcome": "passed", "passed": True, "run_id": "earlier"}
    path.write_text(json.dumps({"runs": [begun]}))
    few = ["--ifeval-prompts", "6", "--quiet", "--json", str(path), "--resume"]

    result = run_check("quick", "--url", url, *few)

    assert result.exit_code == 0, result.output
    runs = report_of(path)["runs"]
    assert [run["run_id"] for run in runs if run["suite"] == "determinism"] == ["earlier"]
    assert len([run for run in runs if run["suite"] == "determinism-concurrent"]) == 2


def test_what_does_not_apply_alone_is_no_pass(start: Callable[..., str]) -> None:
    """A suite that was asked for by name and could not run ends with 1, and says why."""
    result = run_check("routing", "--url", start())

    assert result.exit_code == 1
    assert "--router-admin" in result.output


def test_the_environment_of_its_document_is_heard(
    start: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite of another document hears that one's names, and writes its result files."""
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("NUM_DOCUMENTS", "2")
    monkeypatch.setenv("DOCUMENT_LENGTH", "200")
    monkeypatch.setenv("OUTPUT_LEN", "4")
    path, url = tmp_path / "report.json", start()

    run_check("run-long-doc-qa.sh", "--url", url, "--json", str(path), "--quiet")

    (run,) = report_of(path)["runs"]
    assert run["sampling"]["max_tokens"] == 4
    assert run["sizes"]["document_length"] == {"asked": 200, "run": 200}
    assert (tmp_path / "results/long_doc_qa/lmcache_result.json").is_file()


def pytest_suites(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the shipped tests as a CI would, away from this project's own configuration."""
    suites_package = "kvkeep.validate.pytest_suites"
    command = [sys.executable, "-m", "pytest", "-p", f"{suites_package}.plugin"]
    command += ["--pyargs", suites_package]
    command += ["-p", "no:randomly", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_suites_run_under_pytest(
    start: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right stack passes, what does not apply is skipped, an engine alone fails."""
    monkeypatch.setenv("KVBM_MAX_ITERATIONS", "2")
    monkeypatch.setenv("KVBM_IFEVAL_PROMPTS", "5")
    monkeypatch.setenv("KVBM_MAX_TOKENS", "6")
    right, alone = start(), start("--alone")

    passed = pytest_suites(tmp_path, "-m", "kvbm", "-rs", "--kvkeep-url", right)
    failed = pytest_suites(tmp_path, "-k", "cache_reset", "-m", "kvbm", "--kvkeep-url", alone)

    assert (passed.returncode, "2 passed, 1 skipped" in passed.stdout) == (0, True), passed.stdout
    assert "--router-url" in passed.stdout
    assert failed.returncode == 1
    assert "not-exercised" in failed.stdout


def test_a_wrong_answer_is_asked_again_under_pytest(
    start: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failed test says where it is first wrong, unless that was not wanted."""
    monkeypatch.setenv("KVBM_MAX_ITERATIONS", "2")
    monkeypatch.setenv("KVBM_MAX_TOKENS", "6")
    options = ["-k", "cache_reset and agg", "-m", "kvbm", "--kvkeep-url"]
    url = start("--fault", "flip_every=2")

    looked = pytest_suites(tmp_path, *options, url)
    left = pytest_suites(tmp_path, *options, url, "--kvkeep-no-bisect")

    assert (looked.returncode, left.returncode) == (1, 1)
    assert "It is first wrong from outside, after a reset of the engine" in looked.stdout
    assert "first wrong" not in left.stdout


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
        (("--url", "{url}", "--resume"), "--json"),
        (("--url", "{url}", "--scale", "huge"), "No scale 'huge'"),
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


def test_a_subject_is_judged_by_the_ways_that_a_person_names(
    start: Callable[..., str], tmp_path: Path
) -> None:
    """Another reset and another counter are what the run goes by, and the report tells them."""
    url, path = start(), tmp_path / "report.json"
    ways = ["--subject", "generic", "--reset", f"POST {url}/reset_prefix_cache"]
    ways += ["--external-counters", "vllm:external_prefix_cache_hits_total"]
    ways += ["--external-metrics", f"{url}/metrics"]

    result = determinism("--url", url, "--json", str(path), *ways, *SHORT)

    assert result.exit_code == 0, result.output
    subject = report_of(path)["runs"][0]["subject"]
    assert subject["kind"] == "generic"
    assert subject["hooks"]["outside"]["address"] == f"{url}/metrics"


@pytest.mark.parametrize(
    ("ways", "code", "said"),
    [
        (("--reset", "POST /nothing"), 1, "The server has no /nothing: name another request"),
        (("--external-counters", "nothing_counts"), 1, "name its counters with"),
        (("--subject", "trtllm"), 1, "no request that empties its cache"),
        (("--subject", "sglang"), 2, "There is no subject 'sglang'"),
        (("--reset", "BREW /pot"), 2, "--reset takes a request"),
        (("--external-metrics", "/m"), 2, "name the counters too"),
        (("--external-counters", "a", "--external-metrics", "/no"), 2, "look at --external-metri"),
    ],
)
def test_ways_that_lead_nowhere_prove_nothing(
    start: Callable[..., str], tmp_path: Path, ways: tuple[str, ...], code: int, said: str
) -> None:
    """A reset that is not there fails, a counter that never counts is no proof."""
    path = tmp_path / "report.json"

    result = determinism("--url", start(), "--json", str(path), *ways, *SHORT)

    assert result.exit_code == code, result.output
    told = path.read_text() if path.exists() else result.output
    assert said in told
