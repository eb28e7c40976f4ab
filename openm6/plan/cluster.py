"""What a plan runs on: equal devices in nodes, their rates as they are reached, and what was assumed."""

from __future__ import annotations

from dataclasses import dataclass

from openm6.plan.hardware import GIB, Gpu

# What is reached of the specified rates; each is an assumption until the machine itself was measured.
PRODUCTS = 0.8  # of the peak, in the largest products, where nobody has measured the card
DENSE = 0.6  # of the best product, by all products of a dense layer, small kernels and waiting included
EXPERTS = 0.45  # the same for grouped products
STREAM = 0.85  # of a memory's or a link's rate
ALL_TO_ALL = 0.75  # of a link's rate, with the busiest rank in mind

# Watts by what a device does, as parts of its rating, and what the rest of the node draws beside it.
COMPUTING, MOVING, WAITING = 0.85, 0.6, 0.3
OTHER_PARTS = 0.35

HOST_MEMORY = 64.0  # GiB for each GPU
PER_NODE = 8
NETWORK = 1.5625e9  # bytes a second for each GPU: 100 Gbit/s for a node of eight


@dataclass(frozen=True)
class Cluster:
    """`devices` equal devices, `per_node` in a node. Memory and host memory in bytes, rates of one device in bytes or
    operations a second, as they are reached; watts as rated; price in US dollars an hour, None where none was given.
    """

    name: str
    devices: int
    per_node: int
    memory: float
    host_memory: float
    dense_rate: float
    expert_rate: float
    memory_rate: float
    host_link: float
    peer_link: float
    network: float
    watts: float
    price: float | None = None
    assumed: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.per_node)

    def draw(self, computing: float, moving: float, waiting: float) -> float:
        """Watts of one device and its part of the node; the three shares of the time sum to 1."""
        return self.watts * (COMPUTING * computing + MOVING * moving + WAITING * waiting + OTHER_PARTS)


@dataclass(frozen=True)
class ClusterOptions:
    """What a person may say of a cluster; None leaves it to the table or to an assumption that is told.

    host_memory: GiB of a node; host_link, network: GB/s of one GPU each way; price: US dollars for a GPU and hour.
    """

    devices: int = 1
    per_node: int = PER_NODE
    host_memory: float | None = None
    host_link: float | None = None
    network: float | None = None
    price: float | None = None


def gpu_cluster(gpu: Gpu, options: ClusterOptions) -> Cluster:
    """A cluster of a GPU from the table."""
    per_node = min(options.per_node, options.devices)
    assumed = []
    host = options.host_memory
    if host is None:
        host = HOST_MEMORY * per_node
        assumed.append(f"host memory of {host:.0f} GiB a node")
    network = (options.network or 0.0) * 1e9 or gpu.network
    if not network:
        network = NETWORK
        assumed.append(f"a network of {network / 1e9:.2f} GB/s for each GPU")
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
        peer_link=ALL_TO_ALL * (gpu.peer_link or gpu.host_link / 2),
        network=ALL_TO_ALL * network,
        watts=gpu.watts,
        price=options.price,
        assumed=tuple(assumed),
    )
