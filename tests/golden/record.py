"""Golden record: losses of short runs and seeded answers, to compare a rewrite with the code before it.

    python -m tests.golden.record            compares with tests/golden/record.json; exit code 1 if they differ
    python -m tests.golden.record --write    stores what this machine gives, here
    python -m tests.golden.record demo offload-2     only these

Everything runs through the command line and the server, as a user would, so that no rewrite of the inside changes
the recorder. On the machine and with the torch version of the record, values are equal to the bit; elsewhere the
order of sums differs, and losses are equal to `TOLERANCE`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
STORE = Path(__file__).with_name("record.json")
TOLERANCE = 5e-3  # relative, of a loss on another machine
STEPS = 40

QUICK = ["eval.records=2", "eval.answers=1", "eval.drawn=1", "eval.samples=1", "eval.decoding.steps=2"]
STEADY = [
    "loop.log_every=1",
    f"loop.steps={STEPS}",
    f"loop.save_every={STEPS}",
    "loop.tensorboard=false",
    *QUICK,
]
GIANT = ["loop.stages.switch.step=20", "eval.records=2", "loop.precision=fp32"]
TINY = "tests/golden/tiny.yaml"

# Name of a run: the words behind `openm6 train`.
RUNS: dict[str, list[str]] = {
    "demo": ["demo", "loop.num_processes=1"],
    "demo-two-processes": ["demo", "loop.num_processes=2"],
    "pseudo-to-real": ["pseudo-to-real", *GIANT],
    "offload-16": [TINY, "loop.offload.num_gpu_layers=0", "loop.optimizer.precision=fp32"],
    "offload-2": [TINY, "loop.offload.num_gpu_layers=1", "loop.optimizer.precision=bf16-adafactor"],
    "offload-1": [TINY, "loop.offload.num_gpu_layers=0", "loop.optimizer.precision=int8-adafactor"],
    "muon": [TINY, "loop.optimizer.name=muon"],
    "adafactor": [TINY, "loop.optimizer.name=adafactor"],
    "four-ranks": [TINY, "--nproc", "4", "parallel.ep=2", "parallel.dp_replicate=2", "packing.batch_size=4"],
}
QUESTIONS: dict[str, list[str]] = {
    "text": ["--text", "What is the capital of France?", "--output", "text"],
    "text-of-image": ["--image", "7.png", "--output", "text"],
    "text-of-audio": ["--audio", "a.wav", "--output", "text"],
    "text-sampled": [
        "--text",
        "say a word",
        "--output",
        "text",
        "--set",
        "text.temperature=0.9",
        "--seed",
        "5",
    ],
    "text-of-image-sampled": [
        "--image",
        "7.png",
        "--output",
        "text",
        "--set",
        "text.temperature=2",
        "--seed",
        "6",
    ],
    "text-of-audio-sampled": [
        "--audio",
        "a.wav",
        "--output",
        "text",
        "--set",
        "text.temperature=2",
        "--seed",
        "7",
    ],
    "image": ["--text", "draw the digit seven", "--output", "image", "--seed", "3"],
    "image-of-audio": ["--audio", "a.wav", "--output", "image", "--seed", "3"],
    "image-masked": [
        "--image",
        "7.png",
        "--output",
        "image",
        "--mask-box",
        "0.25,0.25,0.75,0.75",
        "--seed",
        "3",
    ],
    "audio": ["--text", "say seven", "--output", "audio", "--seed", "3"],
    "numbers": [
        "--numbers",
        "bill_length_mm=40,bill_depth_mm=18",
        "--column",
        "body_mass_g",
        "--output",
        "numbers",
    ],
}


def machine() -> dict[str, str]:
    """What decides the order of floating-point sums."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", info.read_text(), re.M) if info.exists() else None
    vectors = sorted(word for word in (flags[1].split() if flags else []) if word.startswith(("avx", "amx", "fma")))
    return {"torch": torch.__version__, "vectors": " ".join(vectors)}


def run(folder: Path, *words: str) -> str:
    """What the program prints; raises with its complaint if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "openm6", *words],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"openm6 {' '.join(words)}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    return done.stdout


def losses(folder: Path, name: str) -> list[float]:
    """The loss of each step of a run."""
    recipe, *words = RUNS[name]
    recipe = str(ROOT / recipe) if recipe.endswith(".yaml") else recipe
    run(folder, "train", recipe, *STEADY, *words, "--out", name)
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row and "step" in row}
    assert sorted(found) == list(range(1, STEPS + 1)), sorted(found)
    return [found[step] for step in sorted(found)]


def media(folder: Path) -> None:
    """An image and a recording to ask about."""
    grid = np.linspace(0, 255, 40)
    Image.fromarray(np.stack([np.add.outer(grid, grid * k) % 256 for k in (1, 2, 3)], -1).astype(np.uint8)).save(
        folder / "7.png"
    )
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000)
    soundfile.write(folder / "a.wav", wave, 16_000)


def digest(data: bytes) -> str:
    """Content of an image or a recording, whatever its file's encoding."""
    if data[:4] == b"RIFF":
        plain = soundfile.read(io.BytesIO(data), dtype="int16")[0].tobytes()
    else:
        plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes()
    return hashlib.sha256(plain).hexdigest()[:16]


def answers(folder: Path) -> dict[str, str]:
    """Answers of the command line, one at a time."""
    found = {}
    for name, words in QUESTIONS.items():
        file = {"image": "out.png", "audio": "out.wav"}.get(words[words.index("--output") + 1])
        said = run(folder, "generate", "demo", *words, *(["--out", file] if file else []))
        found[name] = digest((folder / file).read_bytes()) if file else said.strip()
    return found


def served(folder: Path) -> dict[str, str]:
    """Answers of the server, all requests at once, so that they are batched."""
    command = [sys.executable, "-m", "openm6", "serve", "demo", "--port", "8437"]
    server = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for("http://127.0.0.1:8437/ready", server)
        image = base64.b64encode((folder / "7.png").read_bytes()).decode()
        seen = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}]
        chats = {
            "text": {
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
            },
            "text-sampled": {
                "messages": [{"role": "user", "content": "say a word"}],
                "temperature": 0.9,
                "seed": 5,
            },
            "text-of-image-sampled": {
                "messages": [{"role": "user", "content": seen}],
                "temperature": 2,
                "seed": 6,
            },
            "text-of-image": {"messages": [{"role": "user", "content": seen}], "temperature": 0},
        }
        bodies: dict[str, tuple[str, dict[str, Any]]] = {
            name: ("chat/completions", {"model": "default", "max_tokens": 16, **body}) for name, body in chats.items()
        }
        bodies["image"] = ("images/generations", {"prompt": "draw the digit seven", "seed": 3})
        bodies["audio"] = ("audio/speech", {"input": "seven", "seed": 3, "response_format": "wav"})
        row = {"bill_length_mm": 40, "bill_depth_mm": 18, "body_mass_g": None}
        bodies["numbers"] = ("predict", {"rows": [row], "columns": ["body_mass_g"]})
        with ThreadPoolExecutor(len(bodies)) as pool:
            asked = {name: pool.submit(post, *request) for name, request in bodies.items()}
            return {name: content(future.result()) for name, future in asked.items()}
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not become ready")


def post(path: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:8437/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        data: bytes = reply.read()
    return data


def content(reply: bytes) -> str:
    """What was answered, without what differs from call to call."""
    if not reply.startswith(b"{"):
        return digest(reply)
    found = json.loads(reply)
    if "choices" in found:
        return str(found["choices"][0]["message"]["content"])
    if "b64_json" in found["data"][0]:
        return digest(base64.b64decode(found["data"][0]["b64_json"]))
    return json.dumps(found["data"], sort_keys=True)


def record(names: list[str], folder: Path) -> dict[str, Any]:
    """The losses of the named runs, and answers of the demo's model if it is among them."""
    found: dict[str, Any] = {"machine": machine(), "losses": {}}
    for name in names:
        found["losses"][name] = losses(folder, name)
        print(f"{name}: {found['losses'][name][0]} ... {found['losses'][name][-1]}", flush=True)
    if "demo" in names:
        media(folder)
        found["answers"], found["served"] = answers(folder), served(folder)
    return found


def differences(found: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What differs, one sentence each."""
    same = found["machine"] == stored["machine"]
    wrong = []
    for name, values in found["losses"].items():
        for step, (new, old) in enumerate(zip(values, stored["losses"][name], strict=True), 1):
            if abs(new - old) > (0 if same else TOLERANCE * abs(old)):
                wrong.append(f"{name}: the loss of step {step} is {new}, not {old}")
                break
    for part in ("answers", "served"):
        for name, value in found.get(part, {}).items():
            if same and value != stored[part].get(name):
                wrong.append(f"{part}/{name}: {value!r}, not {stored[part].get(name)!r}")
    return wrong


def main(words: list[str]) -> int:
    names = [word for word in words if not word.startswith("--")] or list(RUNS)
    with tempfile.TemporaryDirectory() as folder:
        found = record(names, Path(folder))
    if "--write" in words:
        stored = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {"losses": {}}
        found = {**stored, **found, "losses": {**stored["losses"], **found["losses"]}}
        STORE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    wrong = differences(found, json.loads(STORE.read_text(encoding="utf-8")))
    print("\n".join(wrong) or "equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
