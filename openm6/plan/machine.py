"""This machine as a cluster of one, from what was measured of it."""

from __future__ import annotations

from openm6.plan.ceilings import Ceilings
from openm6.plan.cluster import Cluster


def machine_cluster(ceilings: Ceilings, price: float | None = None) -> Cluster:
    """The machine that the ceilings were taken on; its rates are those of whole training parts, not assumptions."""
    largest = max(ceilings.products["float32"].points)[1]
    return Cluster(
        name=ceilings.machine,
        devices=1,
        per_node=1,
        memory=ceilings.memory_bytes,
        host_memory=0.0,
        dense_rate=largest,
        expert_rate=largest,
        memory_rate=ceilings.memory["copy"],
        host_link=ceilings.links.get("host_to_device", ceilings.memory["copy"]),
        peer_link=ceilings.memory["copy"],
        network=ceilings.memory["copy"],
        watts=ceilings.watts["busy"],
        price=price,
        assumed=(f"rates as openm6 bench machine found them on {ceilings.taken}",),
        measured=ceilings,
    )
