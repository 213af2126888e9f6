"""Settings of the object store tier, and requests that fail or come late."""

import contextlib
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore.store
import pytest

from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.testing.tier_contract import block_key, in_parts, read, write
from kvkeep.tiers.object_store import ObjectStoreSettings, ObjectStoreTier
from tests.waiting import HANG_S

# obstore's runtime is made once in a process and kept; made here, it is no test's leak.
obstore.store.MemoryStore().put("x", b"")

KEYS: dict[str, Any] = {"access_key_id": "id", "secret_access_key": "hunter2"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"url": "kv"}, "`url` is s3://bucket"),
        ({"url": "s3://kv"}, "3 to 63"),
        ({"url": "s3://Upper"}, "lower-case"),
        ({"url": "file://relative"}, "file:///folder"),
        ({"url": "memory://", "prefix": "x"}, "prefix"),
        ({"url": "memory://", "timeout_s": 0}, "timeout_s"),
        ({"url": "memory://", "num_threads": 0}, "num_threads"),
        ({"url": "s3://bucket", "endpoint": "https://h"}, "set AWS_ACCESS_KEY_ID"),
        ({"url": "s3://bucket", "endpoint": "http://h", **KEYS}, "in clear.*allow_http"),
        ({"url": "s3://bucket", "endpoint": "ftp://h", **KEYS}, "https://host:port"),
        ({"url": "s3://bucket", "endpoint": "https://u:hunter2@h", **KEYS}, "without a user"),
        ({"url": "s3://bucket", "endpoint": "https://:hunter2@h", **KEYS}, "without a user"),
        ({"url": "s3://bucket", "endpoint": "http://[::1", **KEYS}, "`endpoint` can't be so"),
        ({"url": "s3://bucket", "endpoint": "https://h:99999", **KEYS}, "its port is none"),
        ({"url": "s3://bucket", "endpoint": "https://a..b", **KEYS}, "its host is no name"),
        ({"url": "s3://bucket", "endpoint": "https://h/ a", **KEYS}, "spaces"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings: dict[str, Any], complaint: str) -> None:
    """Before anything is called; it says what to write and shows no secret."""
    with pytest.raises(InputError, match=complaint) as caught:
        ObjectStoreTier(ObjectStoreSettings(**settings))

    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://localhost:1", "https://h"])
def test_secrets_are_not_shown(endpoint: str) -> None:
    """Neither by the settings nor by the tier."""
    settings = ObjectStoreSettings(url="s3://bucket", endpoint=endpoint, **KEYS)
    tier = ObjectStoreTier(settings)

    assert "hunter2" not in repr(settings) + repr(tier)

    tier.close()


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is an extra."""
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)

    with pytest.raises(InputError, match=r"pip install 'kvkeep\[s3\]'"):
        ObjectStoreTier(ObjectStoreSettings(url="memory://"))


class SlowStore:
    """A store whose every request waits until it is told to go on."""

    def __init__(self) -> None:
        self.inner = obstore.store.MemoryStore()
        self.begun = threading.Event()
        self.goes_on = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(*args: Any, **options: Any) -> Any:
            self.begun.set()
            self.goes_on.wait(HANG_S)
            return getattr(self.inner, name)(*args, **options)

        return request


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    """What a tier will find behind ``memory://``."""
    store = SlowStore()
    monkeypatch.setattr(obstore.store, "MemoryStore", lambda: store)
    return store


def test_a_late_request_touches_nothing(slow: SlowStore) -> None:
    """A call ends at its deadline; what still comes goes nowhere near the caller's memory."""
    settings = ObjectStoreSettings(url="memory://", timeout_s=0.3, num_threads=1)
    tier = ObjectStoreTier(settings)
    slow.goes_on.set()
    with contextlib.closing(ObjectStoreTier(ObjectStoreSettings(url="memory://"))) as patient:
        write(patient, [1, 2], 1000)
    slow.goes_on.clear()
    room = bytearray(b"\x5a" * 1000)
    begun_s = time.perf_counter()
    with pytest.raises(UnavailableError, match="did not finish within"):
        tier.read([block_key(1), block_key(2)], [in_parts(room), in_parts(bytearray(1000))])
    took_s = time.perf_counter() - begun_s
    slow.goes_on.set()
    tier.close()

    assert took_s < HANG_S / 2
    assert room == b"\x5a" * 1000


def test_a_late_write_has_the_bytes_of_its_call(slow: SlowStore) -> None:
    """The caller may change its memory after the deadline: what is stored then is whole."""
    settings = ObjectStoreSettings(url="memory://", timeout_s=1.0, num_threads=1)
    tier = ObjectStoreTier(settings)
    memory = bytearray(b"\x01" * 1000)
    with pytest.raises(UnavailableError):
        tier.write([block_key(1), block_key(2)], [in_parts(memory), in_parts(b"x")])
    assert slow.begun.is_set()
    memory[:] = bytes(1000)
    slow.goes_on.set()
    tier.close()
    again = ObjectStoreTier(ObjectStoreSettings(url="memory://"))

    assert read(again, [block_key(1)], 1000) == [b"\x01" * 1000]

    again.close()


def test_a_closed_tier_says_so() -> None:
    """Instead of waiting for threads that are gone."""
    tier = ObjectStoreTier(ObjectStoreSettings(url="memory://"))
    tier.close()

    with pytest.raises(UnavailableError, match="was closed"):
        tier.lookup([block_key(1)])


def test_a_folder_that_can_not_be_used_is_one_sentence(tmp_path: Path) -> None:
    """As of any other store."""
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="can't be opened") as caught:
        ObjectStoreTier(ObjectStoreSettings(url=f"file://{tmp_path}/file/store"))

    assert "\n" not in str(caught.value)


@pytest.fixture(params=[0o000, 0o022, 0o277])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_a_folder_is_nobody_elses(tmp_path: Path) -> None:
    """Whatever the umask is: files can be read by their owner only, and reached by nobody."""
    folder = tmp_path / "made" / "store"
    folder.parent.mkdir(mode=0o700)
    folder.parent.chmod(0o700)
    tier = ObjectStoreTier(ObjectStoreSettings(url=f"file://{folder}"))
    assert write(tier, [1]) == [True]
    tier.close()

    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}


def test_folders_that_others_could_enter_are_closed(tmp_path: Path) -> None:
    """Those below the user's own, which stays as it is."""
    tmp_path.chmod(0o755)
    settings = ObjectStoreSettings(url=f"file://{tmp_path}")
    (tmp_path / settings.prefix).mkdir(mode=0o755)
    tier = ObjectStoreTier(settings)
    write(tier, [1])
    tier.close()

    assert stat.S_IMODE((tmp_path / settings.prefix).stat().st_mode) == 0o700
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
