"""The GPUs of the table, and a cluster of them as the planner sees it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from openm6.base.config import nearest
from openm6.base.errors import ConfigError
from openm6.base.tables import read_table

GIB = 2**30
TABLE = "gpus"


@dataclass(frozen=True)
class Gpu:
    """One row of the table: specified rates, each way where it is a link; dense operations, not the sparse double.

    memory: usable bytes; rates in bytes or operations a second; measured: the best product anybody measured, 0 where
    nobody did; price: lowest and highest US dollars an hour, 0 where unknown.
    """

    kind: str
    name: str
    memory: float
    memory_rate: float
    rate: float
    measured: float
    half: str
    host_link: float
    peer_link: float
    network: float
    watts: float
    price: tuple[float, float]
    source: str


def gpus(table: Path | None = None) -> dict[str, Gpu]:
    """All GPUs by kind; rows of `table`, a file of the same columns, come on top.

    Raises:
        ConfigError: the file cannot be read, or a row lacks a number that a plan needs.
    """
    rows = read_table(TABLE)
    if table is not None:
        try:
            rows += list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the table of GPUs {table} cannot be read: {error}") from None
    return {row.get("id", ""): _gpu(row) for row in rows}


def gpu(kind: str, table: Path | None = None) -> Gpu:
    """The GPU of that kind.

    Raises:
        ConfigError: it is not in the table; the sentence names the nearest, and how to add one.
    """
    known = gpus(table)
    if kind.lower() not in known:
        raise ConfigError(
            f"no GPU {kind!r} in the table; {nearest(kind.lower(), list(known))}; to add one, give --gpu-table a CSV "
            "with the columns id, name, memory_gib, memory_gb_s, half_tflops, host_link_gb_s, watts"
        )
    return known[kind.lower()]


def _gpu(row: dict[str, str]) -> Gpu:
    def number(column: str, needed: bool = False) -> float:
        text = (row.get(column) or "").strip()
        try:
            return float(text) if text or needed else 0.0
        except ValueError:
            raise ConfigError(
                f"GPU {row.get('id')!r}: {column} must be a number, not {text!r}: mend that cell of the table"
            ) from None

    return Gpu(
        kind=row.get("id", ""),
        name=row.get("name") or row.get("id", ""),
        memory=number("memory_gib", needed=True) * GIB,
        memory_rate=number("memory_gb_s", needed=True) * 1e9,
        rate=number("half_tflops", needed=True) * 1e12,
        measured=number("matmul_measured_tflops") * 1e12,
        half=row.get("half") or "bf16",
        host_link=number("host_link_gb_s", needed=True) * 1e9,
        peer_link=number("peer_link_gb_s") * 1e9,
        network=number("network_gb_s") * 1e9,
        watts=number("watts", needed=True),
        price=(number("usd_hour_low"), number("usd_hour_high")),
        source=row.get("source") or "",
    )
