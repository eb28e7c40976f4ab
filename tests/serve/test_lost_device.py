"""`openm6 serve` in a process of its own: when the device is lost, it is not ready, answers so, and exits."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.devices import on_each_device

ROOT = Path(__file__).parents[2]
BODY = json.dumps({"model": "default", "messages": [{"role": "user", "content": "draw"}], "max_tokens": 3})
# The server of a small model whose first prompt loses the device. It ends only when the file `seen` exists, so that
# its last state can be asked for.
PROGRAM = """
import pathlib, sys, time, torch, uvicorn
import openm6.serve.run, openm6.serve.worker
from openm6.cli.main import main
from openm6.inference.load import LoadedModel
from tests.small_model import loaded

device, seen = torch.device(sys.argv[1]), pathlib.Path(sys.argv[2])

def load(*_, **__):
    model = loaded(3)
    model.omni.to(device)
    return model

def lose(*_, **__):
    if device.type == "cpu":
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\\nmore")
    torch._assert_async(torch.zeros((), device=device))
    torch.cuda.synchronize(device)

class Held(uvicorn.Server):
    ends = False

    @property
    def should_exit(self):
        return self.ends

    @should_exit.setter
    def should_exit(self, ends):
        while ends and not seen.exists():
            time.sleep(0.01)
        self.ends = ends

openm6.serve.run.load = load
openm6.serve.worker.prefill = lose
uvicorn.Server = Held
sys.argv = ["openm6", "serve", "runs/x", "engine.max_num_seqs=2", "engine.max_model_len=64", "--port", "0",
            "--device", sys.argv[1]]
main()
"""


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    return tmp_path / "seen"


@pytest.fixture
def server(device: torch.device, seen: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The server, and the lines of its log so far."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PROGRAM, str(device), str(seen)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, cwd=seen.parent)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))  # type: ignore[union-attr]
    reader.start()
    yield process, lines
    process.kill()
    process.wait()
    reader.join()


def asked(port: int, path: str, body: str | None = None) -> tuple[int, str]:
    """The status of an answer and its content."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET" if body is None else "POST", path, body, {"content-type": "application/json"})
    reply = line.getresponse()
    content = reply.read().decode()
    line.close()
    return reply.status, content


@on_each_device
def test_a_lost_device_is_reported_before_the_server_exits(
    device: torch.device, server: tuple[subprocess.Popen[str], list[str]], seen: Path
) -> None:
    """First /ready turns to 503, then the process ends with a sentence and an exit code; no zombie stays."""
    process, lines = server
    while not (found := re.search(r"serving .* on http://127.0.0.1:(\d+)", "".join(lines))):
        assert process.poll() is None, "".join(lines)
        time.sleep(0.05)
    port = int(found[1])
    assert asked(port, "/ready")[0] == 200
    status, answer = asked(port, "/v1/chat/completions", BODY)
    assert status == 503 and "the engine stopped" in json.loads(answer)["error"]["message"]
    while (status := asked(port, "/ready")[0]) == 200:  # the engine's thread is about to end
        time.sleep(0.05)
    assert status == 503 and process.poll() is None
    assert asked(port, "/v1/chat/completions", BODY)[0] == 503
    seen.touch()
    assert process.wait(60) not in (0, None)
    assert re.search(r"^.*the engine stopped \(AcceleratorError: .*\): start the server again", "".join(lines), re.M)
