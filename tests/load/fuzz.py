"""Fuzz test: broken images, audio clips and bodies for every route; each must be answered, or refused with a 4xx."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from benchmarks.harness import emit
from tests.load.server import Address, Reply, form, served
from tests.load.soak import Json, requests

Dice = random.Random
FAST = {"steps": "1", "seed": "0"}
# A WAV of 60 bytes that claims four gigabytes, a PNG header of 65,535 pixels a side, and other classics.
CLASSICS = (
    b"RIFF\xff\xff\xff\xffWAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x80>\x00\x00\x00}\x00\x00\x02\x00\x10\x00data"
    b"\xff\xff\xff\xff" + bytes(16),
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xff\xff\x00\x00\xff\xff\x08\x02\x00\x00\x00" + bytes(40),
    b"GIF89a\xff\xff\xff\xff\xf7\x00\x00" + bytes(30),
    b"fLaC\x00\x00\x00\x22" + b"\xff" * 34,
    b"OggS" + bytes(60),
    b"",
    b"\x00" * 1000,
)
BODIES = (
    b"",
    b"[" * 100_000,
    b'{"model": NaN}',
    b'{"model": "default", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "default", "messages": [{"role": "user", "content": "\\u0000"}], "max_tokens": 1}',
    b'{"model": "default", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "http://169.254.169.254/"}}]}]}',
    b'{"model": "default", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "file:///etc/passwd"}}]}]}',
    b'{"model": "default", "messages": 1e999}',
    b"\xff\xfe",
    b'{"series": {"name": "x", "values": [1e308, -1e308, null]}}',
    b'{"rows": [{"x": 1e400}]}',
)


def bench_fuzz(trained: Path, uploads: int = 10_000, json_path: Json = None) -> None:
    """Serves a model, sends it what nobody should, and prints the statuses."""
    with served(trained, ("limits.body_bytes=1000000",)) as address:
        emit(fuzz(address, uploads), json_path)


def fuzz(address: Address, uploads: int, seed: int = 0) -> dict[str, Any]:
    """The n-th upload is a function of the seed and n alone."""
    files = _files()
    statuses: Counter[int] = Counter()
    failures: list[dict[str, Any]] = []
    for number in range(uploads):
        dice = Dice(f"{seed} {number}")
        way = WAYS[number % len(WAYS)]
        reply = way(address, dice, files)
        statuses[reply.status] += 1
        if reply.status >= 500 or not _well_formed(reply):
            failures.append({"number": number, "status": reply.status, "body": reply.body[:200].decode("latin-1")})
    alive = address.send("GET", "/ready").status == 200
    return {
        "benchmark": "fuzz",
        "uploads": uploads,
        "seed": seed,
        "statuses": dict(statuses),
        "failures": failures[:20],
        "passed": not failures and alive,
    }


def _well_formed(reply: Reply) -> bool:
    """A refusal has OpenAI's form and one sentence."""
    if reply.status < 400:
        return True
    try:
        message = json.loads(reply.body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(message, str) and bool(message) and "\n" not in message and "Traceback" not in message


def _files() -> tuple[bytes, bytes]:
    """An image and an audio clip that are whole."""
    content = [body["messages"][0]["content"] for path, body in requests() if path.endswith("completions")]
    image, audio = content[1][0]["image_url"]["url"].partition(",")[2], content[2][0]["input_audio"]["data"]
    return base64.b64decode(image), base64.b64decode(audio)


def mutated(data: bytes, dice: Dice) -> bytes:
    """Bytes changed, cut, doubled, swapped, or something else altogether."""
    pick = dice.random()
    if pick < 0.1:
        return dice.choice(CLASSICS)
    if pick < 0.3:
        return data[: dice.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        place = dice.randrange(min(len(changed), dice.choice((16, 64, 10**9))))
        changed[place] = dice.choice((0, 255, dice.randrange(256)))
    if pick > 0.9:
        start = dice.randrange(len(changed))
        changed[start:start] = changed[: dice.randrange(1, 200)]
    return bytes(changed)


def _edit(address: Address, dice: Dice, files: tuple[bytes, bytes]) -> Reply:
    images = {"image": ("a.png", mutated(files[0], dice))}
    if dice.random() < 0.5:
        images["mask"] = ("m.png", mutated(files[0], dice))
    return address.send("POST", "/v1/images/edits", *form({"prompt": "x", **FAST}, images))


def _transcribe(address: Address, dice: Dice, files: tuple[bytes, bytes]) -> Reply:
    audio = {"file": ("../../a.wav", mutated(files[1], dice))}
    return address.send("POST", "/v1/audio/transcriptions", *form({"model": "default"}, audio))


def _chat(address: Address, dice: Dice, files: tuple[bytes, bytes]) -> Reply:
    """A broken file within a body that is whole; at times its base64 is broken, too."""
    audio = dice.random() < 0.5
    text = base64.b64encode(mutated(files[int(audio)], dice)).decode()
    if dice.random() < 0.1:
        text = text[:-1] + dice.choice("!=é\x00")
    part = (
        {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
        if audio
        else {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
    )
    message = {"role": "user", "content": [part, {"type": "text", "text": "?"}]}
    return address.post("/v1/chat/completions", {"model": "default", "messages": [message], "max_tokens": 1})


def _body(address: Address, dice: Dice, files: tuple[bytes, bytes]) -> Reply:
    """A body that is broken itself."""
    path, body = dice.choice(requests())
    data = dice.choice(BODIES) if dice.random() < 0.5 else mutated(json.dumps(body).encode(), dice)
    return address.send("POST", dice.choice((path, "/v1/predict", "/v1/audio/speech")), data)


def _form(address: Address, dice: Dice, files: tuple[bytes, bytes]) -> Reply:
    """A form that is broken itself."""
    body, kind = form({"prompt": "x", **FAST}, {"image": ("a.png", files[0])})
    return address.send("POST", "/v1/images/edits", mutated(body, dice), kind)


WAYS: tuple[Callable[[Address, Dice, tuple[bytes, bytes]], Reply], ...] = (
    _edit,
    _transcribe,
    _chat,
    _body,
    _form,
)


if __name__ == "__main__":
    typer.run(bench_fuzz)
