"""`openm6 generate`: one question, one answer, to a file or to the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import PIL.Image
import soundfile

from openm6.core.errors import ConfigError
from openm6.core.files import check_writable, replace_bytes, replace_text
from openm6.core.log import get_log
from openm6.inference.coverage import assess
from openm6.inference.engine import generate_scored, predict_distributions
from openm6.inference.load import LoadedModel, convert_weights, load, precision_of
from openm6.inference.masked import decode_masked
from openm6.inference.question import Question, prompt_parts
from openm6.inference.sampling import Decoding
from openm6.kernels.probe import capabilities
from openm6.modalities.audio import RATE
from openm6.modalities.image import Image
from openm6.modalities.interface import Segment
from openm6.modalities.registry import source_segments

SUFFIXES = {"image": (".png", ".jpg", ".jpeg", ".webp"), "audio": (".wav", ".flac", ".ogg")}


def generate(
    path: Path,
    question: Question,
    decoding: Decoding,
    out: Path | None = None,
    num_gpu_layers: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> str:
    """Ask the model of a run or checkpoint; return the text to print, and write `out` if it is given.

    Images and audio are always written, by default to answer.png or answer.wav. See `load` for the
    last three.

    Raises:
        CheckpointError, ConfigError, DataError: the model, the question or its files cannot be used.
        OutputError: the answer cannot be written; what the file held is still there.
    """
    # Checked before any work is done.
    if question.output in SUFFIXES:
        suffixes = SUFFIXES[question.output]
        out = out or Path(f"answer{suffixes[0]}")
        if out.suffix.lower() not in suffixes:
            raise ConfigError(f"--out {out} must end in one of {', '.join(suffixes)} for --output {question.output}")
    if out is not None:
        check_writable(out, "--out")
    loaded = load(path, device, num_gpu_layers, precision=precision_of(dtype))
    if dtype == "auto" and loaded.omni.device.type == "cuda" and capabilities(loaded.omni.device).bf16:
        convert_weights(loaded.omni, "bfloat16")
    return answer_question(loaded, question, decoding, out)


def answer_question(loaded: LoadedModel, question: Question, decoding: Decoding, out: Path | None) -> str:
    """Return the printed answer to a question and write its file; what the model was not trained for is logged."""
    parts = prompt_parts(question, loaded)
    prompt = source_segments(parts, loaded.modalities)
    confidence = None
    if question.output in SUFFIXES:
        assert out is not None
        modality = loaded.image if question.output == "image" else loaded.audio
        target = modality.blank()
        if question.is_inpainting:
            (masked,) = (part for part in parts if part.modality == question.output)
            target = modality.target(masked.raw, options=masked.options)
        codes = decode_masked(loaded.omni, [prompt], [target], decoding.masked)[0].cpu()
        buffer, suffix = io.BytesIO(), out.suffix.lower()
        if isinstance(modality, Image):
            modality.decode(codes).save(buffer, format=PIL.Image.registered_extensions()[suffix])
        else:
            soundfile.write(buffer, modality.decode(codes), RATE, format=suffix[1:])
        replace_bytes(out, buffer.getvalue())
        answer = f"wrote {out}"
    else:
        if question.output == "text":
            answer, confidence = generate_scored(loaded, [prompt], decoding.text)[0]
        else:
            answer = _numbers(loaded, question, prompt)
        if out is not None:
            replace_text(out, answer + "\n")
    found = assess(parts, question.output, loaded.description, confidence)
    if not found.trained:
        get_log().warning(found.en)
    return answer


def _numbers(loaded: LoadedModel, question: Question, prompt: list[Segment]) -> str:
    """Distributions of the target column or of the steps ahead, as JSON."""
    name = question.target_column() if question.series is None else question.series.name
    # A target needs values; these are only asked for.
    value = loaded.numbers.scale(name)[0]
    raw = {name: value} if question.series is None else question.series.to_forecast(question.ahead)
    histogram = predict_distributions(loaded.omni, [prompt], [loaded.numbers.target(raw)])[0]
    low, high = histogram.interval(0.8)
    found = {"mean": histogram.mean(), "median": histogram.median(), "low_80": low, "high_80": high}
    rounded = {key: [float(f"{value:.5g}") for value in values] for key, values in found.items()}
    plain = {key: values[0] if len(values) == 1 else values for key, values in rounded.items()}
    return json.dumps({name: plain}, ensure_ascii=False)
