"""A synthetic evaluation with all four kinds of answer, and data that tries to be markup."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from openm6.core.run_folder import RunFolder
from openm6.evaluate.results import EvalReport, RunFacts, Sample, TaskResult
from openm6.inference.question import Answer
from openm6.modalities.histogram import BINS, LIMIT, Histogram
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries

EVIL = "</p><script>alert('1')</script><img src=x onerror=\"alert(2)\"> & 中文\x00\ud800"


def image(side: int = 64, colour: int = 200) -> Image.Image:
    pixels = np.full((side, side, 3), 255, np.uint8)
    pixels[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = (colour, 60, 40)
    return Image.fromarray(pixels)


def image_bytes(side: int = 64) -> bytes:
    stream = io.BytesIO()
    image(side).save(stream, "PNG")
    return stream.getvalue()


def audio(seconds: float = 0.5) -> np.ndarray:
    time = np.arange(round(16_000 * seconds)) / 16_000
    return (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def audio_bytes(seconds: float = 0.5) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, audio(seconds), 16_000, format="FLAC")
    return stream.getvalue()


def histogram(count: int = 1, loc: float = 10.0, scale: float = 2.0) -> Histogram:
    """A normal distribution around `loc`, in units of `scale`, `count` times."""
    middles = np.linspace(-LIMIT, LIMIT, BINS + 1)[:-1] + LIMIT / BINS
    shape = np.exp(-0.5 * np.square(np.sinh(middles))) * np.cosh(middles)
    return Histogram(np.tile(shape / shape.sum(), (count, 1)), np.tile([[loc, scale]], (count, 1)))


def result(
    task: str,
    pair: tuple[str, str],
    metric: str,
    samples: list[Sample],
    interval: tuple[float, float] = (0.5, 1.5),
) -> TaskResult:
    return TaskResult(
        task=task,
        source="things",
        input_modality=pair[0],
        output_modality=pair[1],
        metric=metric,
        value=0.625,
        value_interval=(0.5, 0.75),
        baseline=0.25,
        better="higher" if metric == "exact_match" else "lower",
        baseline_name="frequent answer",
        advantage_interval=(0.2, 0.5) if metric == "exact_match" else (-0.5, -0.2),
        information_gain=sum(interval) / 2,
        information_interval=interval,
        null_predictor="model without inputs",
        records=40,
        answered=20,
        metrics={metric: 0.625, "knn_accuracy": np.float32(0.5)},
        samples=samples,
    )


def sample(given: list[Part], answer: Answer, truth: object) -> Sample:
    return Sample(given, answer, truth, "record/1")


def results() -> list[TaskResult]:
    say, draw = Part("text", f"say {EVIL}"), Part("text", "draw it")
    holed = Part("image", image_bytes(), {"mask_box": (0.25, 0.5, 0.75, 1.0)})
    silenced = Part("audio", audio_bytes(), {"mask_span": (0.25, 0.5), "seconds": 1.0})
    row = Part("numbers", {EVIL: 4.5, "mass_g": None})
    past = Part("numbers", NumberSeries("temp_max", [5.0, None, 7.0, *range(8, 30)]))
    future = NumberSeries("temp_max", [11.0, None, 9.0, 10.0])
    return [
        result(
            "image_classification",
            ("image", "text"),
            "exact_match",
            [sample([Part("image", image_bytes())], EVIL, "ship")],
        ),
        result(
            "keywords_to_text",
            ("text", "text"),
            "exact_match",
            [sample([say], "ship", "Ship."), sample([say], "", EVIL)],
        ),
        result(
            "text_to_image",
            ("text", "image"),
            "bits_per_code",
            [sample([draw], image(32), image_bytes())],
            (-1.0, 2.0),
        ),
        result("image_inpainting", ("image", "image"), "bits_per_code", [sample([holed], image(), image_bytes())]),
        result(
            "text_to_speech",
            ("text", "audio"),
            "bits_per_code",
            [sample([say], audio(), audio_bytes())],
            (-3.0, -1.0),
        ),
        result(
            "audio_inpainting",
            ("audio", "audio"),
            "bits_per_code",
            [sample([silenced], audio(1.0), audio_bytes())],
        ),
        result(
            "tabular_regression",
            ("numbers", "numbers"),
            "relative_crps",
            [sample([row], histogram(), {EVIL: 10.5})],
        ),
        result(
            "time_series_forecasting",
            ("numbers", "numbers"),
            "relative_crps",
            [sample([past], histogram(3), future)],
        ),
    ]


def eval_report() -> EvalReport:
    return EvalReport(results(), 61.5, f"runs/x/checkpoints/step-{EVIL}")


def facts() -> RunFacts:
    return RunFacts(f"demo {EVIL}", "nano", 5_123_456, 2_034_567, 3_512_000, 2140, 391.0, {EVIL: {"psnr": 23.5}})


def run_folder(path: Path, steps: int = 400) -> RunFolder:
    """A run with metrics as the recorder writes them, a score line and a broken last line among them."""
    run = RunFolder.open(path)
    lines = [
        {
            "step": step,
            "loss": 3.0,
            "loss/numbers_out": None if step == 50 else 2 + 100 / step,
            "loss/text": 1 + 100 / step,
            f"loss/{EVIL}": 1.0,
            "expert_load_cv": [1 / step, 2 / step],
            "tokens_per_second": 9000.0 + step,
            "non_finite": 2,
            "spikes": 1,
        }
        for step in range(10, steps + 1, 10)
    ]
    lines.insert(3, {"step": 40, "evaluation": {"score": 0.5}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run.metrics.write_text(text + '{"step": 410, "los', encoding="utf-8")
    return run
