"""Model sizes of the training benchmarks, and the operations of a step."""

from __future__ import annotations

import torch
from pydantic import Field

from openm6.core.config import Config
from openm6.core.errors import ConfigError, nearest
from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig

# Dense bf16 TFLOP/s from data sheets, by prefix of the device name, longest first.
PEAK_TFLOPS = {
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA A100": 312.0,
}


class Sizes(Config):
    """A text decoder with experts in every layer, and its batch."""

    num_layers: int = Field(gt=0)
    width: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    num_experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    hidden: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    rows: int = Field(gt=0)
    length: int = Field(gt=0)

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length

    @property
    def backbone(self) -> BackboneConfig:
        """The same sizes as a config of the backbone, with an auxiliary balance loss as in the baseline."""
        experts = ExpertsConfig(
            intermediate_size=self.hidden,
            num_experts=self.num_experts,
            top_k=self.top_k,
            balance="aux",
            router_aux_loss_coef=0.001,
            router_z_loss_coef=0.0,
        )
        return BackboneConfig(
            hidden_size=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            experts=experts,
        )

    @property
    def expert_flops(self) -> float:
        """Operations of one sparse layer per step, forward and backward: 6 per active weight and token."""
        return 6.0 * 3 * self.width * self.hidden * self.top_k * self.tokens

    @property
    def flops(self) -> float:
        """Model FLOPs of a step: 6 per active weight and token, plus causal attention over half of each row.

        The head is included; embedding and router are not.
        """
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        dense = self.num_layers * self.width * (2 * query + 2 * key) + self.vocabulary * self.width
        attention = 6.0 * self.num_layers * self.tokens * self.length * query
        return 6.0 * dense * self.tokens + self.num_layers * self.expert_flops + attention


BASELINES = ("transformers", "none")  # of whole steps and of layers
SIZES: dict[str, Sizes] = {
    # 3.44B parameters, few large experts.
    "a": Sizes(
        num_layers=8, width=2048, num_heads=16, num_kv_heads=4, head_dim=128,
        num_experts=64, top_k=2, hidden=1024, vocabulary=32_768, rows=8, length=2048,
    ),
    # 5.05B parameters, many small experts.
    "fine": Sizes(
        num_layers=8, width=2048, num_heads=16, num_kv_heads=4, head_dim=128,
        num_experts=128, top_k=8, hidden=768, vocabulary=32_768, rows=4, length=4096,
    ),
    # 9M parameters, for a CPU.
    "cpu": Sizes(
        num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_dim=64,
        num_experts=8, top_k=2, hidden=256, vocabulary=4096, rows=4, length=256,
    ),
}  # fmt: skip


def choose_sizes(name: str | None, device: torch.device) -> Sizes:
    """Return the sizes of a name; None: "a" on a GPU, else "cpu".

    Raises:
        ConfigError: no such name.
    """
    name = default_name(device) if name is None else name
    if name not in SIZES:
        raise ConfigError(f"no sizes {name!r}; {nearest(name, list(SIZES))}")
    return SIZES[name]


def check_baseline(name: str) -> None:
    """Raise ConfigError unless the name is a baseline of whole steps or layers."""
    if name not in BASELINES:
        raise ConfigError(f"no baseline {name!r}: choose {' or '.join(BASELINES)}")


def default_name(device: torch.device) -> str:
    """Return the name of the default sizes of a device."""
    return "a" if device.type == "cuda" else "cpu"


def peak_tflops(device: torch.device) -> float | None:
    """Return the data sheet's dense bf16 rate; None if the device is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [known for known in sorted(PEAK_TFLOPS, key=len, reverse=True) if name.startswith(known)]
    return PEAK_TFLOPS[known[0]] if known else None
