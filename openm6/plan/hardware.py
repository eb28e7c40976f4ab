"""The GPUs of the table, and a cluster of them: rates as they are reached, and what was assumed."""

from __future__ import annotations

import csv
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from openm6.core.errors import ConfigError, nearest
from openm6.core.files import read_table

GIB = 2**30

# What is reached of the specified rates; each is an assumption until the machine itself was measured.
PRODUCTS = 0.8  # of the peak, in the largest products, if the card was not measured
DENSE = 0.6  # of the best product, by all products of a dense layer, small kernels and waiting included
EXPERTS = 0.45  # the same for grouped products
STREAM = 0.85  # of a memory's or a link's rate
ALL_TO_ALL = 0.75  # of a link's rate, with the busiest rank in mind

# Watts by what a device does, as parts of its rating, and what the rest of the node draws beside it.
COMPUTING, MOVING, WAITING = 0.85, 0.6, 0.3
OTHER_PARTS = 0.35

HOST_MEMORY = 64.0  # GiB per GPU
PER_NODE = 8
NETWORK = 1.5625e9  # bytes per second and GPU: 100 Gbit/s for a node of eight


@dataclass(frozen=True)
class Gpu:
    """One row of the table: specified rates, of links in each direction; dense operations, not the sparse double.

    memory: usable bytes; rates in bytes or operations per second; measured: the best measured product, 0 if none was.
    """

    kind: str
    name: str
    memory: float
    memory_rate: float
    rate: float
    measured: float
    host_link: float
    p2p_link: float
    network: float
    watts: float


def gpus(table: Path | None = None) -> dict[str, Gpu]:
    """All GPUs by kind, with the rows of `table`, a file of the same columns; ConfigError if one cannot be used."""
    rows = read_table("gpus")
    if table is not None:
        try:
            rows += list(csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the table of GPUs {table} cannot be read: {error}") from None
    return {(row.get("id") or "").lower(): _gpu(row) for row in rows}


def gpu(kind: str, table: Path | None = None) -> Gpu:
    """The GPU of that kind; ConfigError if it is not in the table: the nearest, and how to add one."""
    known, kind = gpus(table), kind.lower()
    if kind not in known:
        raise ConfigError(
            f"no GPU {kind!r} in the table; {nearest(kind, list(known))}; to add one, pass --gpu-table a CSV "
            "with the columns id, name, memory_gib, memory_gb_s, half_tflops, host_link_gb_s, watts"
        )
    return known[kind]


def _gpu(row: dict[str, str]) -> Gpu:
    def number(column: str, needed: bool = False) -> float:
        text = (row.get(column) or "").strip()
        with suppress(ValueError):
            if (value := float(text or 0)) > 0 or (value == 0 and not needed):
                return value
        raise ConfigError(
            f"GPU {row.get('id')!r}: {column} must be a number above 0, not {text!r}: fix that cell of the table"
        )

    return Gpu(
        kind=row.get("id", ""), name=row.get("name") or row.get("id", ""),
        memory=number("memory_gib", needed=True) * GIB, memory_rate=number("memory_gb_s", needed=True) * 1e9,
        rate=number("half_tflops", needed=True) * 1e12, measured=number("matmul_measured_tflops") * 1e12,
        host_link=number("host_link_gb_s", needed=True) * 1e9, p2p_link=number("peer_link_gb_s") * 1e9,
        network=number("network_gb_s") * 1e9, watts=number("watts", needed=True),
    )  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Equal devices: bytes and reached rates of one, per second; rated watts; US dollars per hour, None if unknown."""

    name: str
    devices: int
    per_node: int
    memory: float
    host_memory: float
    dense_rate: float
    expert_rate: float
    memory_rate: float
    host_link: float
    p2p_link: float
    network: float
    watts: float
    price: float | None = None
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClusterOptions:
    """Of a node GiB of host memory, of a GPU GB/s per direction, US dollars an hour; None: of the table, or assumed."""

    devices: int = 1
    per_node: int = PER_NODE
    host_memory: float | None = None
    host_link: float | None = None
    network: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        for name in ("host_memory", "host_link", "network", "price"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value:g} must be a finite number that is not negative")


def gpu_cluster(gpu: Gpu, options: ClusterOptions) -> Cluster:
    per_node = min(options.per_node, options.devices)
    assumed = []
    host = options.host_memory
    if host is None:
        host = HOST_MEMORY * per_node
        assumed.append(f"host memory of {host:.0f} GiB per node")
    network = (options.network or 0.0) * 1e9 or gpu.network
    if not network:
        network = NETWORK
        assumed.append(f"a network of {network / 1e9:.2f} GB/s per GPU")
    best = gpu.measured or PRODUCTS * gpu.rate
    assumed += [
        f"{DENSE * best / 1e12:.0f} TFLOP/s reached in dense and {EXPERTS * best / 1e12:.0f} in expert layers "
        f"(of {gpu.rate / 1e12:.0f} specified)",
        f"a draw of {COMPUTING:.0%} of the rating while computing, {WAITING:.0%} while waiting, and {OTHER_PARTS:.0%} "
        "for the rest of the node",
    ]
    link = (options.host_link or 0.0) * 1e9 or gpu.host_link
    return Cluster(
        name=f"{options.devices} × {gpu.name}",
        devices=options.devices,
        per_node=per_node,
        memory=gpu.memory,
        host_memory=host * GIB / per_node,
        dense_rate=DENSE * best,
        expert_rate=EXPERTS * best,
        memory_rate=STREAM * gpu.memory_rate,
        host_link=STREAM * link,
        p2p_link=ALL_TO_ALL * (gpu.p2p_link or link / 2),
        network=ALL_TO_ALL * network,
        watts=gpu.watts,
        price=options.price,
        assumed=tuple(assumed),
    )
