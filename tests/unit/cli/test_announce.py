"""What ``kvkeep announce`` refuses; real ones are in tests/integration."""

import pytest
from click.testing import CliRunner

from kvkeep.cli.main import main

ETCD = ["--etcd", "http://127.0.0.1:1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["http://127.0.0.1:8000/v1", *ETCD],
        ["127.0.0.1:8000", *ETCD],
        ["http://127.0.0.1:8000", "--etcd", "127.0.0.1:2379"],
        ["http://127.0.0.1:8000", *ETCD, "--prefix", "engines"],
        ["http://127.0.0.1:8000", *ETCD, "--role", "king"],
        ["http://127.0.0.1:8000", *ETCD, "--name", "a b"],
        ["http://127.0.0.1:8000", *ETCD, "--ttl-s", "1"],
        ["http://127.0.0.1:8000", *ETCD, "--ranks", "2"],
        ["http://127.0.0.1:8000", *ETCD, "--etcd-user", "engines"],
        ["http://127.0.0.1:8000", *ETCD, "--etcd-cert-file", "/nowhere"],
        ["http://127.0.0.1:8000", *ETCD, "--etcd-ca-file", "/nowhere"],
        ["http://127.0.0.1:8000", *ETCD, "--etcd-user", "e", "--etcd-password-file", "/nowhere"],
        ["http://127.0.0.1:8000", *ETCD, "--etcd-cert-file", "/no", "--etcd-key-file", "/no"],
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str]) -> None:
    """And code 2, before anything is sent."""
    done = CliRunner().invoke(main, ["announce", *arguments])

    assert done.exit_code == 2
    assert done.output.startswith("kvkeep announce: ")
    assert done.output.count("\n") == 1
