"""Settings of the router: one sentence for each that can't be."""

from pathlib import Path

import pytest

from kvkeep.model.errors import InputError
from kvkeep.router.settings import load_settings

ENGINE = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("port: abc", "port = 'abc' can't be: write a whole number"),
        ("port: 99999", "port = 99999 can't be: write a whole number of at most 65535"),
        ("policy: best", "policy = 'best' can't be: choose from consistent_hash, least_loaded"),
        ("relay: 5", "relay = 5 can't be: write a mapping"),
        ("relay: {speed: 1}", "'relay.speed' is not a setting here: choose from "),
        ("engines: [5]", "engines[0] = 5 can't be: write a mapping"),
        ("engines: [{urll: x}]", "'engines[0].urll' is not a setting here: choose from "),
        ("engines: [{}]", "engines[0].url is missing: write it"),
        ("engines: [foo]", "engines[0] can't be: 'foo' is not an engine's address"),
        ("events: {publish: 'tcp://{host}:x', ranks: 2}", "tcp://{host}:x ends in no port"),
        ("events: {ranks: 2}", "name the first with publish"),
        ("events: {publish: 'tcp://h:65535', ranks: 2}", "none above 65535"),
        ("events: {publish: 'tcp://h:1', replay: 'tcp://h:2', ranks: 2}", "at least 2 ports away"),
        ("events: {publish: 'nats://h:1', ranks: 2}", "give --ranks to kvkeep forward"),
        ("prot: 1", "'prot' is not a setting of the router: choose from "),
        ("{}", "no engine is named: give URLs"),
        ("", "is not a mapping of settings: write lines such as 'port: 8080'"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    """It names what was written and what to write instead, in no words of a library."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_settings(file, {}, {})

    assert sentence in str(caught.value)
    assert not set("\n`$") & set(str(caught.value))


def test_an_unknown_variable_is_named_as_it_was_written() -> None:
    """A misspelt setting would go unnoticed; variables of other programs are left alone."""
    with pytest.raises(InputError, match="the environment's KVKEEP_ROUTER_PROT is not a setting"):
        load_settings(None, {"KVKEEP_ROUTER_PROT": "1"}, {"engines": [ENGINE]})

    environment = {"KVKEEP_POOL_BYTES": "1GiB", "KVKEEP_ROUTER_PORT": "81"}
    assert load_settings(None, environment, {"engines": [ENGINE]}).port == 81


def test_a_file_without_an_end_is_refused() -> None:
    """A mistaken path costs a sentence, not the machine's memory."""
    with pytest.raises(InputError, match="is not a file"):
        load_settings(Path("/dev/zero"), {}, {"engines": [ENGINE]})
