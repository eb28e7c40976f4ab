"""Benchmark `generate`: masked parallel and autoregressive decoding of image codes by the same backbone."""

# Shapes: B rows, N positions, G codes per position, D hidden size

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Json, Report, Timing, alternate, device_name
from openm6.core.device import resolve_device
from openm6.inference.decode import DecodeStep, TextHead
from openm6.inference.masked import MaskedDecodeState, masked_step
from openm6.inference.prefill import prefill
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.codes import CodesAdapter
from openm6.modalities.interface import Part
from openm6.modalities.registry import ModalitiesConfig, build_modalities, source_segments
from openm6.modalities.text import Text, train_tokenizer
from openm6.models.omni import Omni
from openm6.models.presets import PRESETS

WORDS = "draw a small red boat with a green sail under a blue sky"
SECONDS = 150.0


@dataclass(frozen=True)
class Setting:
    """Preset, codec of 256 positions, steps of masked parallel decoding, guidance of both methods."""

    preset: str = "nano"
    codec: str = "image-256"
    steps: int = 8
    guidance: float = 2.0
    repeats: int = 3


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
        longest = self.cache.capacity
        found = []
        for number in range(self.positions):
            arrays = {
                "shown": codes,
                "is_masked": torch.full((1,), number == 0, device=codes.device),
                "positions": like["positions"][number : number + 1],
            }
            x = self.adapter.embed(arrays).expand(rows, -1)
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
            drawn[:, group] = logits.argmax(-1)
        return drawn


def bench_generate(
    json_path: Json = None,
) -> None:
    """Decode an image of 256 positions by masked parallel and by autoregressive decoding.

    \b
    Example: python -m benchmarks generate --json generate.json
    """
    with Report(json_path, SECONDS) as report:
        compare(Setting(), report)


def compare(setting: Setting, report: Report) -> None:
    """Add the results of both methods to the report."""
    device = resolve_device()
    omni, modalities = _model(setting, device)
    image, text = modalities["image"], modalities["text"]
    assert isinstance(text, Text)
    prompt = source_segments([Part("text", WORDS)], modalities)
    blank = image.blank()
    capacity = -(-(sum(map(len, prompt)) + len(blank) + 1) // 64) * 64
    slots = omni.backbone.new_cache(1, capacity)
    sampling = MaskedSampling(steps=setting.steps, guidance=setting.guidance, temperature=0.0)

    def masked() -> Tensor:
        position, _ = prefill(omni, prompt, slots, 0)
        state = MaskedDecodeState(None, blank, sampling, 0, position, device)
        while not masked_step(omni, slots, [state]):
            pass
        return state.codes

    way = Autoregressive(omni, text, len(blank), capacity)
    like = {"positions": torch.from_numpy(blank.arrays["positions"]).to(device)}
    candidates = {
        "masked_parallel": masked,
        "autoregressive": lambda: way.draw(prompt, like, setting.guidance),
    }
    timings: dict[str, Timing] = {}
    report.update(
        {
            "benchmark": "generate",
            "device": device_name(device),
            "torch": torch.__version__,
            "preset": setting.preset,
            "positions": len(blank),
            "codes": len(blank) * way.adapter.groups,
            "steps": setting.steps,
            "guidance": setting.guidance,
        }
    )
    report.later("seconds", lambda: {name: one.summary() for name, one in timings.items() if one.seconds})
    report.later("autoregressive_over_masked", lambda: _ratio(timings))
    alternate(candidates, setting.repeats, 1, report.deadline, device, timings)


def _ratio(timings: dict[str, Timing]) -> float | None:
    slow, fast = timings.get("autoregressive"), timings.get("masked_parallel")
    return slow.median / fast.median if slow and fast and slow.seconds and fast.seconds else None


def _model(setting: Setting, device: torch.device) -> tuple[Omni, Any]:
    """Return an untrained model: time does not depend on the weights."""
    preset = PRESETS[setting.preset]
    values = {"image": {"codec": setting.codec}}
    modalities = build_modalities(
        ModalitiesConfig.model_validate(values), train_tokenizer([WORDS], 320), {"x": (0.0, 1.0)}
    )
    torch.manual_seed(0)
    omni = Omni(preset.backbone, modalities).eval().requires_grad_(False).to(device)
    return (omni.to(torch.bfloat16) if device.type == "cuda" else omni), modalities
