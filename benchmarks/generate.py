"""Benchmark `generate`: masked parallel and autoregressive decoding of image codes by the same backbone.

Both have default settings, a cached prompt and the same precision, and both are timed with and without guidance.
"""

# Shapes: B rows, N positions, G codes per position, D hidden size

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness import Json, Report, Timing, alternate, device_name
from openm6.core.device import resolve_device
from openm6.inference.decode import DecodeStep, TextHead
from openm6.inference.decode_batch import STRIDE
from openm6.inference.masked import MaskedDecodeState, masked_step
from openm6.inference.prefill import prefill
from openm6.inference.sampling import MaskedSampling, draw_from
from openm6.modalities.codes import CodesAdapter
from openm6.modalities.interface import Part
from openm6.modalities.registry import ModalitiesConfig, build_modalities, source_segments
from openm6.modalities.text import Text, train_tokenizer
from openm6.models.omni import Omni
from openm6.models.presets import PRESETS

WORDS = "draw a small red boat with a green sail under a blue sky"
SECONDS = 150.0
REPEATS = 5


class Autoregressive:
    """Autoregressive decoding with a key-value cache, one position per step, by the same step as text.

    The head predicts the codes of a position from all earlier positions; with guidance, a second row has no prompt. The
    quality of the codes is not evaluated: the work is that of a model trained for this order.
    """

    def __init__(self, omni: Omni, text: Text, positions: int, capacity: int) -> None:
        self.omni, self.positions = omni, positions
        self.text_head = TextHead.of(omni, text)
        self.cache = omni.backbone.new_cache(2, capacity)
        self.step = DecodeStep(self.text_head, self.cache)
        adapter = omni.adapter("image_out")
        assert isinstance(adapter, CodesAdapter)
        self.adapter = adapter

    @torch.inference_mode()
    def draw(self, prompt: list[Any], like: dict[str, Tensor], guidance: float) -> Tensor:
        """Return codes of all positions.  # -> N G"""
        position, _ = prefill(self.omni, prompt, self.cache, 0)
        rows = 2 if guidance > 0 else 1
        start = torch.tensor([position, 0][:rows], device=self.omni.device)
        length = torch.tensor([self.cache.lengths[0], 0][:rows], device=self.omni.device)
        codes = torch.zeros(1, self.adapter.groups, dtype=torch.int64, device=self.omni.device)
        found, read = [], self.cache.lengths[0]
        for number in range(self.positions):
            arrays = {
                "shown": codes,
                "is_masked": torch.full((1,), number == 0, device=codes.device),
                "positions": like["positions"][number : number + 1],
            }
            x = self.adapter.embed(arrays).expand(rows, -1)
            # As text does it: no more keys than there are, in steps of a few.
            longest = min(-(-(read + number + 1) // STRIDE) * STRIDE, self.cache.capacity)
            states = self.step.states(x, start + number, length + number, longest)  # B D
            codes = self._codes(states, guidance)
            found.append(codes)
        return torch.cat(found)

    def _codes(self, states: Tensor, guidance: float) -> Tensor:
        drawn = torch.zeros(1, self.adapter.groups, dtype=torch.int64, device=states.device)
        for group in range(self.adapter.groups):
            logits = self.adapter.group_logits(states, drawn.expand(len(states), -1), group).float()
            if guidance > 0:
                logits = logits[:1] + guidance * (logits[:1] - logits[1:])
            drawn[:, group] = draw_from(logits, torch.rand(1, device=logits.device))
        return drawn


def bench_generate(
    json_path: Json = None,
    preset: Annotated[str, typer.Option("--preset", help="Size of the backbone.")] = "nano",
) -> None:
    """Decode an image of 256 positions by masked parallel and by autoregressive decoding.

    \b
    Example: python -m benchmarks generate --json generate.json
    """
    with Report(json_path, SECONDS) as report:
        compare(preset, "image-256", report)


def compare(preset: str, codec: str, report: Report) -> None:
    """Add the results of both methods to the report."""
    device = resolve_device()
    omni, modalities = _model(preset, codec, device)
    image, text = modalities["image"], modalities["text"]
    assert isinstance(text, Text)
    prompt = source_segments([Part("text", WORDS)], modalities)
    blank = image.blank()
    capacity = -(-(sum(map(len, prompt)) + len(blank) + 1) // 64) * 64
    slots = omni.backbone.new_cache(1, capacity)
    default, unguided = MaskedSampling(), MaskedSampling(guidance=0.0)

    def masked(sampling: MaskedSampling) -> Tensor:
        position, _ = prefill(omni, prompt, slots, 0)
        state = MaskedDecodeState(None, blank, sampling, 0, position, device)
        while not masked_step(omni, slots, [state]):
            pass
        return state.codes

    way = Autoregressive(omni, text, len(blank), capacity)
    like = {"positions": torch.from_numpy(blank.arrays["positions"]).to(device)}
    candidates = {
        "masked_parallel": partial(masked, default),
        "autoregressive": partial(way.draw, prompt, like, default.guidance),
        "masked_parallel_unguided": partial(masked, unguided),
        "autoregressive_unguided": partial(way.draw, prompt, like, 0.0),
    }
    timings: dict[str, Timing] = {}
    report.update(
        {
            "benchmark": "generate",
            "device": device_name(device),
            "torch": torch.__version__,
            "precision": str(omni.text.embedding.weight.dtype).removeprefix("torch."),
            "preset": preset,
            "positions": len(blank),
            "codes": len(blank) * way.adapter.groups,
            "steps": default.steps,
            "guidance": default.guidance,
            "passes": default.passes,
        }
    )
    report.later("seconds", lambda: {name: one.summary() for name, one in timings.items() if one.seconds})
    for suffix in ("", "_unguided"):
        report.later(f"autoregressive_over_masked{suffix}", partial(_ratio, timings, suffix))
    alternate(candidates, REPEATS, 1, report.deadline, device, timings)


def _ratio(timings: dict[str, Timing], suffix: str) -> float | None:
    slow, fast = timings.get(f"autoregressive{suffix}"), timings.get(f"masked_parallel{suffix}")
    return slow.median / fast.median if slow and fast and slow.seconds and fast.seconds else None


def _model(preset: str, codec: str, device: torch.device) -> tuple[Omni, Any]:
    """Return an untrained model: time does not depend on the weights."""
    modalities = build_modalities(
        ModalitiesConfig.model_validate({"image": {"codec": codec}}),
        train_tokenizer([WORDS], 320),
        {"x": (0.0, 1.0)},
    )
    torch.manual_seed(0)
    omni = Omni(PRESETS[preset].backbone, modalities).eval().requires_grad_(False).to(device)
    return (omni.to(torch.bfloat16) if device.type == "cuda" else omni), modalities
