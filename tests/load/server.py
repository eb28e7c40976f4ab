"""A server of its own process, and a plain client, for benchmarks that watch one from outside."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openm6.core.errors import TrainingError

STARTING = 120.0  # seconds


@dataclass(frozen=True)
class Reply:
    """Status, headers in small letters, and body of a response."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the number of its process."""

    port: int
    pid: int

    def send(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json", seconds: float = 120
    ) -> Reply:
        """One request on a connection of its own."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            line.request(method, path, body, {"content-type": kind})
            found = line.getresponse()
            headers = {name.lower(): value for name, value in found.getheaders()}
            return Reply(found.status, headers, found.read())
        finally:
            line.close()

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        """A JSON body."""
        return self.send("POST", path, json.dumps(body).encode())

    def resident(self) -> int:
        """Bytes of memory that the process holds, 0 where the system does not say."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def form(fields: dict[str, str], files: dict[str, tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart body and its content type."""
    border = uuid.uuid4().hex
    parts = [
        f'--{border}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, (file, data) in files.items():
        head = f'--{border}\r\ncontent-disposition: form-data; name="{name}"; filename="{file}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{border}--\r\n".encode(), f"multipart/form-data; boundary={border}"


@contextmanager
def served(trained: Path, settings: tuple[str, ...] = ()) -> Iterator[Address]:
    """Runs `openm6 serve` in a process of its own until the block ends.

    Raises:
        TrainingError: it does not come up.
    """
    port = _free_port()
    command = [sys.executable, "-m", "openm6", "serve", str(trained), *settings, "--port", str(port)]
    process = subprocess.Popen(command)
    address = Address(port, process.pid)
    try:
        _wait(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _wait(address: Address, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + STARTING
    while time.monotonic() < end and process.poll() is None:
        try:
            if address.send("GET", "/ready", seconds=5).status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise TrainingError("the server did not come up: start it with openm6 serve and read what it says")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
