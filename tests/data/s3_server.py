"""moto's server, a real process that speaks S3, with a bucket of files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def s3_bucket(folder: Path, place: str, log: Path) -> Iterator[str]:
    """Files of `folder` in `place` (BUCKET/PREFIX) of a server; gives an address with `{name}` for what follows it.

    Sets this process's credentials for the time of the block.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(log, "wb") as stream:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=stream, stderr=stream)
    before = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    try:
        _wait_for(port, server)
        from pyarrow.fs import S3FileSystem

        options = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
        system = S3FileSystem(**options, allow_bucket_creation=True)
        system.create_dir(place)
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with system.open_output_stream(f"{place}/{path.relative_to(folder)}") as out:
                out.write(path.read_bytes())
        yield f"s3://{place}{{name}}?" + "&".join(f"{key}={value}" for key, value in options.items())
    finally:
        server.kill()
        server.wait()
        os.environ.clear()
        os.environ.update(before)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "moto's server ended"
        time.sleep(0.1)
    raise AssertionError("moto's server did not begin to listen")
