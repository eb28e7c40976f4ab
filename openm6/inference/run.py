"""`openm6 generate`: one question, one answer, to a file or to the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile
import torch

from openm6.core.errors import ConfigError
from openm6.core.files import check_place, replace_bytes, replace_text
from openm6.core.log import get_log
from openm6.inference.engine import generate_scored, predict_distributions
from openm6.inference.load import LoadedModel, load
from openm6.inference.masked import decode_masked
from openm6.inference.question import Question, prompt_parts, read_image_file, read_recording
from openm6.inference.sampling import Decoding, MaskedSampling
from openm6.inference.taught import assess
from openm6.modalities.audio import RATE, Audio
from openm6.modalities.image import Image
from openm6.modalities.interface import Segment
from openm6.modalities.numbers import Histogram, NumberSeries
from openm6.modalities.registry import source_segments

SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".webp"), "audio": (".wav", ".flac", ".ogg")}


def generate(
    path: Path,
    question: Question,
    decoding: Decoding,
    out: Path | None = None,
    num_gpu_layers: int | None = None,
) -> str:
    """Ask the model of a run or checkpoint; return the text to print, and write `out` if it is given.

    Images and audio are always written, by default to answer.png or answer.wav. `num_gpu_layers` as in `load`.

    Raises:
        CheckpointError, ConfigError, DataError: the model, the question or its files cannot be used.
        OutputError: the answer cannot be written; what the file held is still there.
    """
    out = _target(question.output, out)
    return answer_question(load(path, num_gpu_layers=num_gpu_layers), question, decoding, out)


def _target(output: str, out: Path | None) -> Path | None:
    """The file for the answer, checked before any work is done."""
    if output in SUFFIXES:
        out = out or Path(f"answer{SUFFIXES[output][0]}")
        if out.suffix.lower() not in SUFFIXES[output]:
            raise ConfigError(
                f"--out {out} must end in one of {', '.join(SUFFIXES[output])} for --output {output}"
            )
    if out is not None:
        check_place(out, "--out")
    return out


def answer_question(loaded: LoadedModel, question: Question, decoding: Decoding, out: Path | None) -> str:
    """Return the printed answer to a question and write its file; what the model was not trained for is logged."""
    parts = prompt_parts(question, loaded)
    prompt = source_segments(parts, loaded.modalities)
    confidence = None
    if question.output == "text":
        written, confidence = generate_scored(loaded, [prompt], decoding.text)[0]
        answer = _kept(written, out)
    elif question.output == "numbers":
        answer = _kept(_numbers(loaded, question, prompt), out)
    else:
        assert out is not None
        modality = loaded.image if question.output == "image" else loaded.audio
        codes = _codes(loaded, modality, question, prompt, decoding.masked)
        replace_bytes(out, _file_content(modality, codes, out.suffix.lower()))
        answer = f"wrote {out}"
    found = assess(parts, question.output, loaded.description, confidence)
    if not found.taught:
        get_log().warning(found.en)
    return answer


def _file_content(modality: Image | Audio, codes: torch.Tensor, suffix: str) -> bytes:
    """An image or recording as the bytes of a file with that suffix."""
    buffer = io.BytesIO()
    if isinstance(modality, Image):
        modality.decode(codes).save(buffer, format=PIL.Image.registered_extensions()[suffix])
    else:
        soundfile.write(buffer, modality.decode(codes), RATE, format=suffix[1:])
    return buffer.getvalue()


def _kept(answer: str, out: Path | None) -> str:
    if out is not None:
        replace_text(out, answer + "\n")
    return answer


def _codes(
    loaded: LoadedModel,
    modality: Image | Audio,
    question: Question,
    prompt: list[Segment],
    sampling: MaskedSampling,
) -> torch.Tensor:
    """Codes of the image or recording; those outside the mask of an inpainting are the given ones.  # -> N G"""
    if question.mask_box is not None and question.image is not None:
        target = loaded.image.target(
            read_image_file(question.image, loaded), options={"mask_box": question.mask_box}
        )
    elif question.mask_span is not None and question.audio is not None:
        target = loaded.audio.target(
            read_recording(question.audio, loaded), options={"mask_span": question.mask_span}
        )
    else:
        target = modality.blank()
    return decode_masked(loaded.omni, [prompt], [target], sampling)[0].cpu()


def _numbers(loaded: LoadedModel, question: Question, prompt: list[Segment]) -> str:
    """Distributions of the target column or of the steps ahead, as JSON."""
    raw: Any
    if question.series is not None:
        name = question.series.name
        raw = NumberSeries(
            name, [loaded.numbers.scale(name)[0]] * question.ahead
        )  # any value: only asked for
    else:
        name = question.target_column()
        raw = {name: loaded.numbers.scale(name)[0]}
    histogram = predict_distributions(loaded.omni, [prompt], [loaded.numbers.target(raw)])[0]
    return json.dumps({name: _described(histogram)}, ensure_ascii=False)


def _described(histogram: Histogram) -> dict[str, Any]:
    low, high = histogram.interval(0.8)
    found = {"mean": histogram.mean(), "median": histogram.median(), "low_80": low, "high_80": high}
    return {name: _plain(values) for name, values in found.items()}


def _plain(values: np.ndarray) -> float | list[float]:
    rounded = [float(f"{value:.5g}") for value in values]
    return rounded[0] if len(rounded) == 1 else rounded
