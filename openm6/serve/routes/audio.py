"""`/v1/audio/speech` and `/v1/audio/transcriptions`: audio from text, and text from audio."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Form, Response, UploadFile
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from openm6.core.errors import DataError
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.interface import Part
from openm6.serve.content import AUDIO_TYPES, AudioFormat, audio_file, part_prompt, text_prompt
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit
from openm6.serve.middleware import StrictRoute
from openm6.serve.requests import CodesRequest, TextRequest
from openm6.serve.schemas import EnergyReply, Guidance, MediaUsage, Seed, Steps, chosen_seed
from openm6.serve.server import ThisCall

router = APIRouter(prefix="/v1/audio", tags=["audio"], route_class=StrictRoute, responses=DOCUMENTED)

AUDIO = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in AUDIO_TYPES.values()}
TEXT = {"text/plain": {"schema": {"type": "string"}}}


class SpeechBody(BaseModel):
    """Text to speech. The model has one voice of its own: `voice` is accepted and changes nothing."""

    input: str = Field(min_length=1, max_length=4096)
    model: str | None = None
    voice: str | None = None
    response_format: AudioFormat | Literal["aac"] = "mp3"
    speed: float = Field(default=1.0, ge=0.25, le=4.0)
    stream_format: Literal["audio", "sse"] = "audio"
    seconds: float | None = Field(default=None, gt=0, le=30)
    seed: Seed = None
    steps: Steps = 8
    guidance: Guidance = 2.0


class TranscriptionBody(BaseModel):
    """`prompt` replaces the prompt of the task."""

    file: UploadFile = Field(description="WAV, FLAC, Ogg or MP3")
    model: str | None = None
    language: Literal["en", "zh"] = "en"
    prompt: str | None = Field(default=None, max_length=20_000)
    response_format: Literal["json", "text"] = "json"
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    stream: bool = False


class TranscriptionUsage(MediaUsage):
    type: Literal["tokens"] = "tokens"


class Transcription(EnergyReply):
    """The text of an audio file."""

    text: str
    usage: TranscriptionUsage


@router.post("/speech", response_class=Response, responses={200: {"content": AUDIO}})
async def speak(body: SpeechBody, call: ThisCall) -> Response:
    """An audio file of the text; its joules and seed are in the headers x-joules and x-seed."""
    server, form = call.server, body.response_format
    server.check_model(body.model)
    if form == "aac":
        raise BadRequestError(
            "response_format aac cannot be written: use mp3, opus, flac, wav or pcm", "response_format"
        )
    if body.speed != 1.0:
        raise BadRequestError("speed other than 1 is not offered: leave it out", "speed")
    if body.stream_format != "audio":
        raise BadRequestError("stream_format sse is not offered: use audio", "stream_format")
    check_limit("seconds", body.seconds or 0.0, server.limits.audio_seconds)
    seed = chosen_seed(body.seed)
    request = CodesRequest(
        modality="audio",
        parts=text_prompt(server.loaded, "text_to_speech", body.input),
        duration=body.seconds,
        sampling=MaskedSampling(steps=body.steps, guidance=body.guidance, seed=seed),
    )
    [answer] = await call.answer("speech", [request])
    samples = await asyncio.to_thread(server.loaded.audio.decode, answer.value)
    data = await asyncio.to_thread(audio_file, samples, form)
    headers = {"x-seed": str(seed), "x-sample-rate": str(RATE)}
    if answer.joules is not None:
        headers |= {"x-joules": f"{answer.joules:.6g}", "x-joules-source": answer.energy_source or ""}
    return Response(data, media_type=AUDIO_TYPES[form], headers=headers)


@router.post("/transcriptions", response_model=Transcription, responses={200: {"content": TEXT}})
async def transcribe(
    body: Annotated[TranscriptionBody, Form(media_type="multipart/form-data")], call: ThisCall
) -> Transcription | Response:
    """Text of speech in an audio file."""
    call.server.check_model(body.model)
    if body.stream:
        raise BadRequestError("stream is not offered for transcriptions: leave it out", "stream")
    data = await body.file.read()
    try:
        samples = await asyncio.to_thread(read_audio, data, call.server.limits.audio_seconds)
    except DataError as error:
        raise BadRequestError(f"file: {error}", "file") from None
    part = Part("audio", samples)
    parts = part_prompt("speech_recognition", part, body.language)
    if body.prompt:
        parts = (part, Part("text", " " + body.prompt))
    sampling = Sampling(temperature=body.temperature, max_tokens=64)
    [answer] = await call.answer("transcriptions", [TextRequest(parts=parts, sampling=sampling)])
    text = answer.value.strip()
    if body.response_format == "text":
        return PlainTextResponse(text)
    read, generated = answer.usage.prompt, answer.usage.generated
    usage = TranscriptionUsage(input_tokens=read, output_tokens=generated, total_tokens=read + generated)
    return Transcription(text=text, usage=usage).with_energy([answer])
