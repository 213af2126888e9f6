"""An S3-compatible object store that keeps blocks; a folder or this process's memory serves as one.

One object per block: a head (``entry_names``) and the bytes. Requests of a batch run in parallel,
as a request to an object store is mostly waiting. The calling thread alone touches the caller's
memory, so that a request which outlives its call's deadline can do no harm.
"""

import contextlib
import importlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from kvkeep.model import addresses
from kvkeep.model.clock import SystemClock
from kvkeep.model.errors import InputError, UnavailableError
from kvkeep.model.ids import BlockKey
from kvkeep.tiers.base import Parts, length_of
from kvkeep.tiers.entry_names import (
    HEAD_BYTES,
    PREFIX_DEFAULT,
    DamagedHeads,
    checked_prefix,
    entry_name,
    is_head_of,
    pack_head,
    parse_entry_name,
)
from kvkeep.tiers.memory import scatter

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Answer = TypeVar("Answer")

RETRIES_MAX: Final = 2
"""After a failed request: a server that was started again has hung up on connections kept open."""
REQUEST_SHARE: Final = 0.8
"""Of a call's time for one request. In the rest, failed requests may be tried again, so that both
together end in time."""
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_SECRET_VARIABLES: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStoreSettings:
    """Which store, and how it is used."""

    url: str
    """``s3://bucket``, ``file:///folder`` or ``memory://``."""
    endpoint: str = ""
    """``https://host:port`` of an S3 server; empty: ``AWS_ENDPOINT_URL``, or AWS itself."""
    region: str = ""
    """Empty: ``AWS_REGION``, ``AWS_DEFAULT_REGION``, or us-east-1."""
    access_key_id: str | None = field(default=None, repr=False)
    """None: the environment's ``AWS_ACCESS_KEY_ID``; for AWS itself what its machines offer."""
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    allow_http: bool = False
    """Whether keys and blocks may cross a network in clear; loopback may always."""
    prefix: str = PREFIX_DEFAULT
    """Before every key; deployments that share a bucket differ in it."""
    timeout_s: float = 10.0
    """For one call, whole: choose batches so that they end in a fraction of it."""
    num_threads: int = 8
    """Requests at once, over all calls; each holds one value in memory."""

    def __post_init__(self) -> None:
        checked_prefix(self.prefix)
        if not 0.01 <= self.timeout_s <= 3600:
            raise InputError(f"timeout_s is from 0.01 to 3600 seconds: got {self.timeout_s}")
        if not 1 <= self.num_threads <= 256:
            raise InputError(f"num_threads is from 1 to 256: got {self.num_threads}")


class ObjectStoreTier:
    """Keeps blocks as objects. Thread-safe."""

    def __init__(self, settings: ObjectStoreSettings, name: str = "object_store") -> None:
        """Prepare; the server is called with the first batch.

        Raises:
            InputError: A setting is wrong, or obstore is not installed.
        """
        self.name = name
        self._settings = settings
        self._exceptions = _imported("obstore.exceptions")
        # The client raises exceptions of its own, and Python's for absent objects and files.
        self._failures = (self._exceptions.BaseError, OSError)
        self._store: ObjectStore | None = _opened(settings, os.environ)
        scheme, place = parse_location(settings.url)
        self._folder = Path(place) if scheme == "file" else None
        self._clock = SystemClock()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(settings.num_threads, f"kvkeep-{name}")
        self._damaged = DamagedHeads(name)

    def __repr__(self) -> str:
        return f"ObjectStoreTier({self._where!r}, prefix={self._settings.prefix!r})"

    @property
    def _where(self) -> str:
        at = f" at {self._settings.endpoint}" if self._settings.endpoint else ""
        return f"{self._settings.url}{at}"

    @property
    def num_rotten(self) -> int:
        """Values with damaged heads that reads found, and dropped."""
        return self._damaged.number

    # --- The tier --------------------------------------------------------------------------------

    def write(self, keys: Sequence[BlockKey], values: Sequence[Parts]) -> list[bool]:
        """Keep copies: one object each, whole or not at all."""
        names = self._names(keys)
        kept = [False] * len(keys)

        def prepare(idx: int) -> Callable[[], bool]:
            # Joined here and now: the caller's memory is not ours when a request is late.
            head = pack_head(names[idx], length_of(values[idx]))
            content = b"".join([head, *values[idx]])
            return lambda: self._put(names[idx], content)

        def finish(idx: int, is_kept: bool) -> None:
            kept[idx] = is_kept

        self._in_parallel(len(keys), prepare, finish)
        return kept

    def _put(self, name: str, content: bytes) -> bool:
        try:
            if self._folder is not None:
                _make_private(self._folder, name)
            self._client().put(name, content, use_multipart=False)
            if self._folder is not None:
                with contextlib.suppress(FileNotFoundError):  # deleted since
                    (self._folder / name).chmod(0o600)
        except self._failures as error:
            raise self._unavailable(error) from error
        return True

    def read(self, keys: Sequence[BlockKey], into: Sequence[Parts]) -> list[int | None]:
        """Copy each object once, from where it arrived; drops those whose head is damaged."""
        names = self._names(keys)
        found: list[int | None] = [None] * len(keys)
        damaged: list[int] = []

        def prepare(idx: int) -> Callable[[], tuple[bool, memoryview | None]]:
            room_bytes = length_of(into[idx])
            return lambda: self._get(names[idx], room_bytes)

        def finish(idx: int, answer: tuple[bool, memoryview | None]) -> None:
            is_whole, content = answer
            if not is_whole:
                damaged.append(idx)
            if content is not None:
                scatter(content[HEAD_BYTES:], into[idx])
                found[idx] = len(content) - HEAD_BYTES

        self._in_parallel(len(keys), prepare, finish)
        self._damaged.drop([keys[idx] for idx in damaged], self.delete)
        return found

    def _get(self, name: str, room_bytes: int) -> tuple[bool, memoryview | None]:
        """Fetch an object with its head.

        Returns:
            False where what stands under this name is damaged; and the object, None where there is
            none that fits.
        """
        try:
            answer = self._client().get(name)
            num_bytes = answer.meta["size"]
            value_bytes = num_bytes - HEAD_BYTES
            if value_bytes < 0:
                return False, None
            if value_bytes > room_bytes:
                # The head alone, however long the object is.
                head = self._client().get_range(name, start=0, end=HEAD_BYTES)
                return is_head_of(bytes(head), name, value_bytes), None
            content = memoryview(answer.bytes())
        except self._failures as error:
            if self._is_absent(error):
                return True, None
            raise self._unavailable(error) from error
        if len(content) != num_bytes:
            return True, None  # cut on its way, which says nothing about the object
        is_whole = is_head_of(content[:HEAD_BYTES], name, value_bytes)
        return is_whole, content if is_whole else None

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Ask for sizes: an object shorter than a head is none of ours."""
        names = self._names(keys)
        found = [False] * len(keys)

        def finish(idx: int, is_there: bool) -> None:
            found[idx] = is_there

        self._in_parallel(len(keys), lambda idx: lambda: self._has(names[idx]), finish)
        return found

    def _has(self, name: str) -> bool:
        try:
            return self._client().head(name)["size"] >= HEAD_BYTES
        except self._failures as error:
            if self._is_absent(error):
                return False
            raise self._unavailable(error) from error

    def keys(self) -> Iterator[BlockKey]:
        """Go through the store's names, page by page."""
        try:
            for page in self._client().list(self._settings.prefix):
                for entry in page:
                    key = parse_entry_name(entry["path"], self._settings.prefix)
                    if key is not None:
                        yield key
        except self._failures as error:
            raise self._unavailable(error) from error

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """Forget."""
        names = self._names(keys)
        self._in_parallel(
            len(keys), lambda idx: lambda: self._delete_one(names[idx]), lambda _, __: None
        )

    def _delete_one(self, name: str) -> None:
        try:
            self._client().delete(name)
        except self._failures as error:
            if not self._is_absent(error):
                raise self._unavailable(error) from error

    def close(self) -> None:
        """Wait for requests that are under way: each has a deadline."""
        with self._lock:
            self._store = None  # hangs up, once no request needs it
        self._threads.shutdown(wait=True, cancel_futures=True)

    # --- Asking ----------------------------------------------------------------------------------

    def _names(self, keys: Sequence[BlockKey]) -> list[str]:
        return [entry_name(key, self._settings.prefix) for key in keys]

    def _in_parallel(
        self,
        count: int,
        prepare: Callable[[int], Callable[[], Answer]],
        finish: Callable[[int, Answer], None],
    ) -> None:
        """Run requests, as many at once as there are threads.

        Args:
            count: How many.
            prepare: Gives the request of an index; called here, just before the request runs.
            finish: Takes its answer; called here.

        Raises:
            UnavailableError: A request failed, or time ran out. Requests under way go on to their
                own end, and nothing of the caller's is touched by them.
        """
        if count == 1:
            # Handing one request to a thread costs two switches and gains nothing.
            finish(0, prepare(0)())
            return
        end_s = self._clock.now_s() + self._settings.timeout_s
        under_way: dict[Future[Answer], int] = {}
        begun = 0
        try:
            while begun < count or under_way:
                while begun < count and len(under_way) < self._settings.num_threads:
                    under_way[self._submit(prepare(begun))] = begun
                    begun += 1
                left_s = max(0.0, end_s - self._clock.now_s())
                done, _ = wait(under_way, left_s, FIRST_COMPLETED)
                if not done:
                    raise UnavailableError(self._too_slow())
                for future in done:
                    finish(under_way.pop(future), future.result())
        finally:
            for future in under_way:
                future.cancel()

    def _submit(self, request: Callable[[], Answer]) -> "Future[Answer]":
        with self._lock:
            if self._store is not None:
                return self._threads.submit(request)
        raise UnavailableError(f"{self.name} was closed: open it again")

    def _client(self) -> "ObjectStore":
        with self._lock:
            if self._store is None:
                raise UnavailableError(f"{self.name} was closed: open it again")
            return self._store

    # --- Failures --------------------------------------------------------------------------------

    def _is_absent(self, error: BaseException) -> bool:
        """Whether this says that there is no such object, in a bucket that is there."""
        return isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)

    def _unavailable(self, error: Exception) -> UnavailableError:
        """Say what to do; the client's own text names requests and keys, and is left out."""
        return UnavailableError(f"the object store {self._where} {self._complaint(error)}")

    def _complaint(self, error: Exception) -> str:
        text = str(error)
        if isinstance(error, FileNotFoundError):
            return "has no such bucket: create it, or mend `url`"
        names = self._exceptions
        if isinstance(error, names.PermissionDeniedError | names.UnauthenticatedError):
            return (
                "refused the key or what it may do: mend AWS_ACCESS_KEY_ID and its secret, "
                "or the rights"
            )
        status = re.search(r"status code: (\d{3})", text)
        if status is not None:
            return f"answered with status {status[1]}: see its log"
        if "kind: Timeout" in text or "TimedOut" in text:
            return f"did not answer within {self._settings.timeout_s} s: see whether it runs"
        return "can't be reached, or hung up: see whether it runs and has room"

    def _too_slow(self) -> str:
        return (
            f"the object store {self._where} did not finish within {self._settings.timeout_s} s: "
            "see whether it is overloaded or stopped"
        )


def parse_endpoint(endpoint: str) -> tuple[str, str, int, str]:
    """Read ``https://host:port``, or ``http``; a path may follow.

    Returns:
        Scheme, host in one spelling, port, path without slashes at its ends.

    Raises:
        InputError: It is none of these. The message holds nothing of it, as it may hold a password.
    """
    try:
        parts = addresses.split_url(endpoint)
        port = addresses.port_of(parts, 443 if parts.scheme == "https" else 80)
        host = addresses.checked_host(parts.hostname) if parts.hostname else ""
    except ValueError as error:
        raise InputError(f"an S3 server's `endpoint` can't be so, {error}: mend it") from None
    is_plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in ("http", "https") or not host or not is_plain or " " in endpoint:
        raise InputError(
            "an S3 server's `endpoint` is written https://host:port, without a user or spaces"
        )
    return parts.scheme, host, port, parts.path.strip("/")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError("obstore is not installed: pip install 'kvkeep[s3]'") from error


def _opened(settings: ObjectStoreSettings, environment: Mapping[str, str]) -> "ObjectStore":
    stores = _imported("obstore.store")
    scheme, place = parse_location(settings.url)
    if scheme == "memory":
        return cast("ObjectStore", stores.MemoryStore())
    if scheme == "file":
        return _opened_folder(stores, place)
    return _opened_s3(stores, settings, place, environment)


def parse_location(url: str) -> tuple[str, str]:
    """Read ``s3://bucket``, ``file:///folder`` or ``memory://``.

    Returns:
        Scheme; bucket or folder.

    Raises:
        InputError: It is none of these.
    """
    scheme, _, place = url.partition("://")
    is_bucket = scheme == "s3" and _BUCKET.fullmatch(place) is not None
    is_folder = scheme == "file" and place.startswith("/")
    if is_bucket or is_folder or url == "memory://":
        return scheme, place
    raise InputError(
        "an object store's `url` is s3://bucket with 3 to 63 lower-case letters, digits, '.' "
        "and '-', or file:///folder, or memory://"
    )


def _make_private(folder: Path, name: str) -> None:
    """Make the folders of an object, whatever the umask is, so that nobody else gets to it.

    The client makes files by the umask alone, and this process's is not ours to change.
    """
    for part in reversed((folder / name).relative_to(folder).parents[:-1]):
        path = folder / part
        try:
            path.mkdir(mode=0o700)
            is_private = False  # the umask may take even the owner's rights
        except FileExistsError:
            found = path.stat()
            # What another user made and lets us write to is theirs to open or close.
            is_private = found.st_mode & 0o777 == 0o700 or found.st_uid != os.geteuid()
        if not is_private:
            path.chmod(0o700)


def _opened_folder(stores: Any, path: str) -> "ObjectStore":
    try:
        if not os.path.lexists(path):
            os.makedirs(path, mode=0o700, exist_ok=True)
            os.chmod(path, 0o700)
        return cast("ObjectStore", stores.LocalStore(path, mkdir=True))
    except (OSError, _imported("obstore.exceptions").BaseError) as error:
        raise InputError(f"the folder {path!r} of `url` can't be opened: make it") from error


def _opened_s3(
    stores: Any, settings: ObjectStoreSettings, bucket: str, environment: Mapping[str, str]
) -> "ObjectStore":
    endpoint = settings.endpoint or environment.get("AWS_ENDPOINT_URL", "")
    given = (settings.access_key_id, settings.secret_access_key, settings.session_token)
    secrets = [
        value or environment.get(variable)
        for value, variable in zip(given, _SECRET_VARIABLES, strict=True)
    ]
    if endpoint and None in secrets[:2]:
        raise InputError(
            "an S3 server needs a key: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or `access_key_id` and `secret_access_key`"
        )
    config = {
        "aws_endpoint": endpoint or None,
        "aws_region": settings.region
        or environment.get("AWS_REGION")
        or environment.get("AWS_DEFAULT_REGION", "us-east-1"),
        "aws_virtual_hosted_style_request": False if endpoint else None,
        **{
            variable.lower(): secret
            for variable, secret in zip(_SECRET_VARIABLES, secrets, strict=True)
        },
    }
    time_limit = timedelta(seconds=settings.timeout_s * REQUEST_SHARE)
    store: ObjectStore = stores.S3Store(
        bucket,
        config={name: value for name, value in config.items() if value is not None},
        client_options={
            "timeout": time_limit,
            "connect_timeout": time_limit,
            "allow_http": _may_be_http(endpoint, settings),
        },
        retry_config={
            "max_retries": RETRIES_MAX,
            "retry_timeout": timedelta(seconds=settings.timeout_s * (1 - REQUEST_SHARE)),
            "backoff": {
                "init_backoff": timedelta(milliseconds=20),
                "max_backoff": timedelta(milliseconds=200),
                "base": 2,
            },
        },
    )
    return store


def _may_be_http(endpoint: str, settings: ObjectStoreSettings) -> bool:
    if not endpoint:
        return False
    scheme, host, *_ = parse_endpoint(endpoint)
    if scheme == "https":
        return False
    if settings.allow_http or host in LOOPBACK:
        return True
    raise InputError(
        f"{host} would get keys and blocks in clear: write https:// in `endpoint`, "
        "or set `allow_http`"
    )
