"""This machine as a cluster of one, from what was measured of it."""

from __future__ import annotations

from openm6.plan.ceilings import Ceilings
from openm6.plan.cluster import ALL_TO_ALL, COMPUTING, DENSE, EXPERTS, STREAM, Cluster


def machine_cluster(ceilings: Ceilings, price: float | None = None, processor: bool = False) -> Cluster:
    """The machine that the ceilings were taken on: its GPU where it has one, else, or with `processor`, its cores.

    The rates of a processor are those of whole training parts; those of a GPU are the same shares of its products as
    for the GPUs of the table, but of products, memory and link as they were measured.
    """
    if ceilings.gpu is not None and not processor:
        return _gpu_cluster(ceilings, ceilings.gpu, price)
    largest = max(ceilings.products["float32"].points)[1]
    copy = ceilings.memory["copy"]
    return Cluster(
        name=ceilings.machine,
        devices=1,
        per_node=1,
        memory=ceilings.host_bytes or ceilings.memory_bytes,
        host_memory=0.0,
        dense_rate=largest,
        expert_rate=largest,
        memory_rate=copy,
        host_link=copy,
        peer_link=copy,
        network=copy,
        watts=ceilings.watts["busy"],
        price=price,
        assumed=(f"rates as openm6 bench machine found them on {ceilings.taken}",),
        measured=ceilings,
    )


def _gpu_cluster(ceilings: Ceilings, gpu: str, price: float | None) -> Cluster:
    halves = [ceilings.products[name] for name in ("bfloat16", "float16") if name in ceilings.products]
    products = max(rate for curve in halves for _, rate in curve.points)
    grouped = max(rate for _, rate in ceilings.grouped["bfloat16"].points)
    link = ceilings.links["both_ways"]
    said = (
        f"products of {products / 1e12:.0f} and grouped products of {grouped / 1e12:.0f} TFLOP/s, memory and link as "
        f"openm6 bench machine found them on {ceilings.taken}",
        f"{DENSE:.0%} of the products reached in dense layers, {EXPERTS / DENSE:.0%} of that in experts at most",
    )
    return Cluster(
        name=gpu,
        devices=1,
        per_node=1,
        memory=ceilings.memory_bytes,
        host_memory=ceilings.host_bytes or 0.0,
        dense_rate=DENSE * products,
        expert_rate=min(EXPERTS * products, DENSE * grouped),
        memory_rate=STREAM * ceilings.memory["copy"],
        host_link=link,
        peer_link=ALL_TO_ALL * link,
        network=ALL_TO_ALL * link,
        watts=ceilings.watts["busy"] / COMPUTING,
        price=price,
        assumed=said,
    )
