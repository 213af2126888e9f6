"""What a Valkey tier says about a server's refusals, from a server that gives one answer only."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.testing.tier_contract import block_key, in_parts
from kvkeep.tiers.valkey import ValkeySettings, ValkeyTier


@contextlib.contextmanager
def tier_on(path: Path, answer: bytes, **settings: str) -> Iterator[ValkeyTier]:
    """A tier whose server answers whatever comes first with this."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(answer)
                connection.recv(1 << 16)

        server = threading.Thread(target=serve)
        server.start()
        tier = ValkeyTier(ValkeySettings(url=f"unix://{path}", timeout_s=5.0, **settings))  # type: ignore[arg-type]
        yield tier
        tier.close()
        listener.shutdown(socket.SHUT_RDWR)
        server.join()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"-LOADING Valkey is loading the dataset in memory\r\n", "is still loading its data"),
        (b"-READONLY You can't write against a read only replica.\r\n", "name its primary"),
        (b"-MISCONF Errors writing to the AOF file\r\n", "make room there"),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", "is one of a cluster"),
        (b"-NOAUTH Authentication required.\r\n", "set VALKEY_PASSWORD"),
        (b"-ERR max number of clients reached\r\n", "max number of clients reached.*see its log"),
        (b":7\r\n", "answered something else"),
        (b"HTTP/1.1 400 Bad Request\r\n", "does not speak the protocol of Valkey"),
    ],
)
def test_a_refusal_is_one_sentence(tmp_path: Path, answer: bytes, sentence: str) -> None:
    """It names the server and says what to do."""
    with tier_on(tmp_path / "s", answer) as tier:
        with pytest.raises(UnavailableError, match=sentence) as caught:
            tier.write([block_key(1)], [in_parts(b"x")])

        assert f"the Valkey server at {tmp_path / 's'} " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_want_of_room_is_no_error(tmp_path: Path) -> None:
    """The value is declined; the caller may keep it elsewhere."""
    with tier_on(
        tmp_path / "s", b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    ) as tier:
        assert tier.write([block_key(1)], [in_parts(b"x")]) == [False]


def test_a_password_that_nobody_asked_for(tmp_path: Path) -> None:
    """The server's own words help, and the password is in none of them."""
    answer = b"-ERR AUTH <password> called without any password configured\r\n"
    with tier_on(tmp_path / "s", answer, password="hunter2") as tier:
        with pytest.raises(UnavailableError, match="without any password configured") as caught:
            tier.lookup([block_key(1)])

        assert "hunter2" not in str(caught.value) + repr(tier)


def test_a_closed_tier_says_so() -> None:
    """Instead of opening connections that nobody will close."""
    tier = ValkeyTier(ValkeySettings())
    tier.close()

    with pytest.raises(UnavailableError, match="was closed"):
        tier.lookup([block_key(1)])


@pytest.mark.parametrize("ca_file", ["a\0b", "/dev/null/x", "/dev/null"])
def test_certificates_that_can_not_be_are_refused(ca_file: str) -> None:
    """In one sentence that names the setting, before anybody is called."""
    with pytest.raises(InputError, match="mend `ca_file`"):
        ValkeyTier(ValkeySettings(url="valkeys://h", ca_file=ca_file))
