"""Settings of a server: its address, the limits of a request, and the capacity of the engine."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from openm6.core.config import Config
from openm6.inference.load import Precision
from openm6.inference.sampling import MAX_TOKENS
from openm6.kernels.probe import capabilities

# A name, not an address: its last part is not a number.
HOST = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])")


class Limits(Config):
    """The limits of one request; what exceeds one is refused before any work is done."""

    body_bytes: int = Field(default=16 * 2**20, ge=1024)
    body_seconds: float = Field(default=60.0, gt=0, description="for a whole body to arrive")
    header_bytes: int = Field(default=32 * 2**10, ge=1024)
    connections: int = Field(default=1024, ge=1, description="open at once; more are answered with 503")
    json_depth: int = Field(default=32, ge=4)
    json_values: int = Field(default=100_000, ge=64, description="commas and brackets of a JSON body")
    pixels: int = Field(default=4_000_000, ge=64)
    audio_seconds: float = Field(default=30.0, gt=0)
    messages: int = Field(default=64, ge=1)
    parts: int = Field(default=64, ge=1)
    characters: int = Field(default=20_000, ge=1)
    tokens: int = Field(default=512, ge=1, le=MAX_TOKENS)
    answers: int = Field(default=8, ge=1)
    columns: int = Field(default=128, ge=1)
    rows: int = Field(default=256, ge=1)
    candidates: int = Field(default=256, ge=1)
    seconds: float = Field(default=120.0, gt=0, description="until a request without an answer is dropped")
    fetch_bytes: int = Field(default=8 * 2**20, ge=1024, description="of the fetched images of a request together")
    fetch_seconds: float = Field(default=5.0, gt=0, description="for all images of a request to be fetched")


class EngineConfig(Config):
    """How much the engine computes at once.

    max_num_seqs: texts decoded side by side; max_model_len: tokens of prompt and answer together, for each of them
    max_num_media: images and audio decoded side by side
    max_num_single_pass: requests answered in one pass each (numbers, ranks, embeddings) per tick
    batch_invariant: batch-invariant shapes, so that a request gets the same bits alone or among others; auto: on a CPU
    max_num_batched_tokens: prompt tokens read per tick, at least one prompt
    max_queued_tokens: tokens of work that may wait before more is refused
    prefix_cache_bytes: size of the prefix cache
    weights: auto is bfloat16 on a GPU that multiplies it fast, else float32
    max_cuda_graphs: decoding passes recorded at the start, on a GPU; what has no graph runs as it is, 0: all
    compile: layers compiled at the start, for texts on a CPU; kept in a folder for the next start
    num_gpu_layers: layers that stay on the device; the others are offloaded
    """

    max_num_seqs: int = Field(default=16, ge=1, le=1024)
    max_model_len: int = Field(default=1024, ge=16)
    max_num_media: int = Field(default=8, ge=1, le=256)
    max_num_single_pass: int = Field(default=4, ge=1)
    max_num_batched_tokens: int = Field(default=1024, ge=1)
    batch_invariant: bool | Literal["auto"] = "auto"
    max_queued_tokens: int = Field(default=32_768, ge=1)
    prefix_cache_bytes: int = Field(default=64 * 2**20, ge=0)
    device: str = "auto"  # or cpu, cuda, cuda:N
    weights: Precision | Literal["auto"] = "auto"
    max_cuda_graphs: int = Field(default=128, ge=0)
    compile: bool = False
    num_gpu_layers: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _weights_can_move(self) -> EngineConfig:
        if self.num_gpu_layers is not None and self.weights == "int8":
            raise ValueError("weights=int8 keeps its copies on the device: leave out num_gpu_layers, or take bfloat16")
        return self

    def precision(self, device: torch.device) -> Precision:
        if self.weights != "auto":
            return self.weights
        return "bfloat16" if device.type == "cuda" and capabilities(device).bf16 else "float32"

    def is_invariant(self, device: torch.device) -> bool:
        """Whether shapes on a device are batch-invariant."""
        return device.type != "cuda" if self.batch_invariant == "auto" else self.batch_invariant


class ServeConfig(Config):
    """A server as a whole; `hosts` are those from which images may be fetched, none by default."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    keys: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    hosts: tuple[str, ...] = ()
    limits: Limits = Limits()
    engine: EngineConfig = EngineConfig()

    @field_validator("hosts")
    @classmethod
    def _plain_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        hosts = tuple(host.lower() for host in hosts)
        for host in hosts:
            if not HOST.fullmatch(host):
                raise ValueError(f"the host {host!r} must be a plain name such as images.example.org")
        return hosts
