"""`/v1/audio/speech` and `/v1/audio/transcriptions`: sounds from words, and words from sounds."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Response, UploadFile
from fastapi import Request as HTTPRequest
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from openm6.base.errors import DataError
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.audio import RATE, read_sound
from openm6.modalities.interface import Part
from openm6.serve.errors import DOCUMENTED, BadRequestError
from openm6.serve.guard import StrictRoute
from openm6.serve.media import SOUND_TYPES, SoundFormat, write_sound
from openm6.serve.replies import ask_all
from openm6.serve.requests import CodesRequest, TextRequest
from openm6.serve.schemas import MAX_SEED, Energy, chosen_seed, joules_of
from openm6.serve.state import ThisClient, ThisServer
from openm6.serve.words import part_in_words, taught, text_in_words

router = APIRouter(prefix="/v1/audio", tags=["audio"], route_class=StrictRoute, responses=DOCUMENTED)

SOUNDS = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in SOUND_TYPES.values()}


class Speech(BaseModel):
    """What to say. The model has one voice of its own: `voice` is accepted and changes nothing."""

    input: str = Field(min_length=1, max_length=4096)
    model: str | None = None
    voice: str | None = None
    response_format: SoundFormat | Literal["aac"] = "mp3"
    speed: float = Field(default=1.0, ge=0.25, le=4.0)
    stream_format: Literal["audio", "sse"] = "audio"
    seconds: float | None = Field(default=None, gt=0, le=30)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int = Field(default=8, ge=1, le=64)
    guidance: float = Field(default=2.0, ge=0, le=20)


class HeardUsage(BaseModel):
    """Tokens as OpenAI counts those of transcriptions."""

    type: Literal["tokens"] = "tokens"
    input_tokens: int
    output_tokens: int
    total_tokens: int


class Transcription(Energy):
    """What was said."""

    text: str
    usage: HeardUsage


@router.post("/speech", response_class=Response, responses={200: {"content": SOUNDS}})
async def speak(body: Speech, server: ThisServer, client: ThisClient, http: HTTPRequest) -> Response:
    """A sound file of the text; its joules and seed are in the headers x-joules and x-seed."""
    server.check_model(body.model or "default")
    form = body.response_format
    if form == "aac":
        raise BadRequestError(
            "response_format aac cannot be written: use mp3, opus, flac, wav or pcm", "response_format"
        )
    if body.speed != 1.0:
        raise BadRequestError("speed other than 1 is not offered: leave it out", "speed")
    if body.stream_format != "audio":
        raise BadRequestError("stream_format sse is not offered: use audio", "stream_format")
    loaded, seed = server.engine.loaded, chosen_seed(body.seed)
    if body.seconds is not None and body.seconds > server.config.limits.sound_seconds:
        raise BadRequestError(
            f"seconds exceeds {server.config.limits.sound_seconds:g}: ask for less", "seconds"
        )
    request = CodesRequest(
        want="sound",
        parts=text_in_words("speak", body.input) if taught(loaded, "speak") else (Part("text", body.input),),
        client=client,
        seconds=server.config.limits.seconds,
        duration=body.seconds,
        sampling=MaskedSampling(steps=body.steps, guidance=body.guidance, seed=seed),
    )
    answers = await ask_all(server, http, "speech", [request])
    samples = await asyncio.to_thread(loaded.sound.decode, answers[0].value)
    data = await asyncio.to_thread(write_sound, samples, form)
    joules, source = joules_of(answers)
    headers = {"x-seed": str(seed), "x-sample-rate": str(RATE)}
    if joules is not None:
        headers |= {"x-joules": f"{joules:.6g}", "x-joules-source": source or ""}
    return Response(data, media_type=SOUND_TYPES[form], headers=headers)


TEXT = {"text/plain": {"schema": {"type": "string"}}}


@router.post("/transcriptions", response_model=Transcription, responses={200: {"content": TEXT}})
async def transcribe(
    server: ThisServer,
    client: ThisClient,
    http: HTTPRequest,
    file: Annotated[UploadFile, File(description="WAV, FLAC, Ogg or MP3")],
    model: Annotated[str | None, Form()] = None,
    language: Annotated[Literal["en", "zh"], Form()] = "en",
    prompt: Annotated[str | None, Form(max_length=20_000)] = None,
    response_format: Annotated[Literal["json", "text"], Form()] = "json",
    temperature: Annotated[float, Form(ge=0, le=2, allow_inf_nan=False)] = 0.0,
    stream: Annotated[bool, Form()] = False,
) -> Transcription | Response:
    """What is said in a sound file. `prompt` replaces the words in which the model is asked."""
    server.check_model(model or "default")
    if stream:
        raise BadRequestError("stream is not offered for transcriptions: leave it out", "stream")
    data = await file.read()
    limit = server.config.limits.sound_seconds
    try:
        samples = await asyncio.to_thread(read_sound, data, limit)
    except DataError as error:
        raise BadRequestError(f"file: {error}", "file") from None
    part = Part("sound", samples)
    words = (part, Part("text", " " + prompt)) if prompt else part_in_words("transcribe", part, language)
    request = TextRequest(
        parts=words,
        client=client,
        seconds=server.config.limits.seconds,
        sampling=Sampling(temperature=temperature, max_tokens=64),
    )
    answers = await ask_all(server, http, "transcriptions", [request])
    text = answers[0].value.strip()
    if response_format == "text":
        return PlainTextResponse(text)
    joules, source = joules_of(answers)
    read, given = answers[0].usage.prompt, answers[0].usage.given
    usage = HeardUsage(input_tokens=read, output_tokens=given, total_tokens=read + given)
    return Transcription(text=text, usage=usage, joules=joules, joules_source=source)
