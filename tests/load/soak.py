"""Soak test: a mixed load at twice the capacity; answers, refusals, memory and `/health` are checked."""

from __future__ import annotations

import base64
import io
import json
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer
from PIL import Image

from benchmarks.arrivals import tails
from benchmarks.harness import emit
from tests.load.server import Address, served

KEPT = ("choices", "data", "text")  # of an answer: what must not depend on the crowd
FLAT = 1.05
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as well.")]


@dataclass
class Found:
    """What was seen; written by many threads under one lock."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def bench_soak(trained: Path, minutes: float = 10.0, json_path: Json = None) -> None:
    """Serves a model, loads it, and prints what was found; `passed` says whether all of it is as it should be."""
    with served(trained, ("engine.max_queued_tokens=4096",)) as address:
        emit(soak(address, minutes * 60), json_path)


def soak(address: Address, seconds: float, clients: int | None = None) -> dict[str, Any]:
    """Each request is asked once alone, then all of them again and again in a crowd.

    `clients` ask without a pause; by default as many as give twice what the server answers in a second.
    """
    replies = [(one, address.post(*one)) for one in requests()]
    # A model without embeddings refuses them: what it does not offer is not part of its load.
    bodies = [one for one, reply in replies if reply.status == 200]
    alone = [_kept(reply.body) for _, reply in replies if reply.status == 200]
    rate = _capacity(address, bodies)
    found = Found()
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=_watch, args=(address, found, end))]
    interval = 0.5 / rate  # twice the capacity
    began = time.monotonic()
    for thread in threads:
        thread.start()
    asked = _ask_in_crowd(address, bodies, alone, found, interval, end, clients or 256)
    for thread in threads:
        thread.join()
    return _told(found, asked, rate, time.monotonic() - began, seconds)


def _ask_in_crowd(
    address: Address,
    bodies: list[tuple[str, dict[str, Any]]],
    alone: list[str],
    found: Found,
    interval: float,
    end: float,
    most: int,
) -> int:
    """Send one request every `interval` seconds, each from its own thread, at most `most` at once."""
    places = threading.Semaphore(most)
    threads: list[threading.Thread] = []
    number = 0
    while time.monotonic() < end:
        places.acquire()
        pick = number % len(bodies)
        thread = threading.Thread(target=_ask, args=(address, bodies[pick], alone[pick], found, places))
        thread.start()
        threads = [one for one in threads if one.is_alive()] + [thread]
        number += 1
        time.sleep(interval)
    for thread in threads:
        thread.join()
    return number


def _ask(
    address: Address,
    request: tuple[str, dict[str, Any]],
    alone: str,
    found: Found,
    places: threading.Semaphore,
) -> None:
    path, body = request
    try:
        reply = address.post(path, body)
        answer = _kept(reply.body) if reply.status == 200 else ""
        with found.lock:
            found.statuses[reply.status] += 1
            if reply.status == 200 and answer != alone:
                found.wrong.append(path)
            if reply.status == 429 and "retry-after" not in reply.headers:
                found.wrong.append("429 without Retry-After")
    except OSError as error:
        with found.lock:
            found.wrong.append(f"{path}: {type(error).__name__}")
    finally:
        places.release()


def _watch(address: Address, found: Found, end: float) -> None:
    """Asks for /health ten times a second, and looks at the memory."""
    while time.monotonic() < end:
        began = time.monotonic()
        address.send("GET", "/health")
        with found.lock:
            found.health.append(time.monotonic() - began)
            found.resident.append((time.monotonic(), address.resident()))
        time.sleep(0.1)


def _capacity(address: Address, bodies: list[tuple[str, dict[str, Any]]]) -> float:
    """Requests a second when a few are always on their way."""
    threads = [threading.Thread(target=address.post, args=one) for one in bodies * 2]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(threads) / (time.monotonic() - began)


def _kept(body: bytes) -> str:
    """The part of an answer that must be the same each time: not its id, time or joules."""
    values = json.loads(body)
    kept = {name: values[name] for name in KEPT if name in values}
    for choice in kept.get("choices", []):
        if choice["message"].get("audio"):
            choice["message"]["audio"] = choice["message"]["audio"]["data"]
    return json.dumps(kept, sort_keys=True)


def _told(found: Found, asked: int, rate: float, seconds: float, wanted: float) -> dict[str, Any]:
    start = found.resident[0][0]
    tenths: dict[int, list[int]] = {}
    for moment, size in found.resident:
        tenths.setdefault(min(9, int(10 * (moment - start) / wanted)), []).append(size)
    memory = [statistics.median(tenths[tenth]) for tenth in sorted(tenths)]
    # In the first tenth it may still grow: caches and arenas fill.
    growth = memory[-1] / memory[1] if len(memory) > 1 and memory[1] else 1.0
    health = tails(found.health)
    answered, refused = found.statuses[200], found.statuses[429]
    others = {status: count for status, count in found.statuses.items() if status not in (200, 429)}
    return {
        "benchmark": "soak",
        "seconds": seconds,
        "capacity_requests_per_second": rate,
        "asked": asked,
        "answered": answered,
        "refused": refused,
        "other_statuses": others,
        "wrong": Counter(found.wrong),
        "health_seconds": health,
        "memory_bytes_by_tenth": memory,
        "memory_growth": growth,
        "passed": not others and not found.wrong and answered > 0 and growth <= FLAT and health["p95"] < 0.1,
    }


def requests() -> list[tuple[str, dict[str, Any]]]:
    """One of each kind, with seeds, so that the answer is known beforehand."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_image()}"}}
    audio = {"type": "input_audio", "input_audio": {"data": _audio(), "format": "wav"}}
    asked: list[tuple[Any, dict[str, Any]]] = [
        ("draw the digit seven", {"temperature": 0.8}),
        ([image, {"type": "text", "text": "What is this?"}], {}),
        ([audio, {"type": "text", "text": "What is said?"}], {"temperature": 1.0, "top_p": 0.9}),
        ("say zero", {"modalities": ["audio"], "audio": {"format": "pcm"}}),
        ("画数字七", {"modalities": ["image"]}),
    ]
    chats: list[tuple[str, dict[str, Any]]] = [
        (
            "/v1/chat/completions",
            {
                "model": "default",
                "seed": number,
                "max_tokens": 24,
                "messages": [{"role": "user", "content": content}],
                **more,
            },
        )
        for number, (content, more) in enumerate(asked)
    ]
    return [
        *chats,
        ("/v1/images/generations", {"prompt": "a red apple", "seed": 3}),
        ("/v1/embeddings", {"input": ["an apple", "七"]}),
        ("/v1/rank", {"query": "What is this?", "candidates": ["an apple", "a pear", "seven"]}),
    ]


def _image() -> str:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _audio() -> str:
    out = io.BytesIO()
    soundfile.write(out, 0.3 * np.sin(np.arange(8000) / 6), 16_000, format="WAV")
    return base64.b64encode(out.getvalue()).decode()


if __name__ == "__main__":
    typer.run(bench_soak)
