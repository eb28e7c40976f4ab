"""`/v1/images` and `/v1/audio`: images from text, inpainting within a mask, audio from text, and text from audio."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Form, Response, UploadFile
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from openm6.core.errors import DataError
from openm6.inference.question import Question, prompt_parts, trained_prompt
from openm6.inference.sampling import Sampling
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.interface import Part
from openm6.serve import content, schemas
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit
from openm6.serve.requests import Answer, CodesRequest, TextRequest, decode_codes
from openm6.serve.server import Call, Server, StrictRoute, ThisCall
from openm6.tasks.slots import MAX_TOKENS

router = APIRouter(prefix="/v1", route_class=StrictRoute, responses=DOCUMENTED)
AUDIO = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in content.AUDIO_TYPES.values()}
TEXT = {"text/plain": {"schema": {"type": "string"}}}


class GenerationBody(BaseModel):
    """What to draw. `steps`, `guidance` and `seed` are ours; the rest is OpenAI's."""

    prompt: str = Field(min_length=1, max_length=20_000)
    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=8, description="1 by default")
    size: str | None = Field(default=None, description="auto, or the model's own size, such as 64x64")
    response_format: Literal["b64_json"] | None = None
    output_format: content.ImageFormat | None = None
    stream: bool | None = None
    seed: schemas.Seed = None
    steps: schemas.Steps | None = None
    guidance: schemas.Guidance | None = None


class EditBody(GenerationBody):
    """Image and prompt; where a mask, or the image itself, is transparent, it is filled in, whatever the prompt says.

    The prompt of such a request chooses the language alone, as models are trained to fill in without words.
    """

    image: UploadFile | None = None
    listed: list[UploadFile] = Field(default=[], alias="image[]", description="as clients name a list: one image")
    mask: UploadFile | None = None


class ImageData(BaseModel):
    b64_json: str


class InputDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class ImageUsage(schemas.MediaUsage):
    input_tokens_details: InputDetails


class Images(schemas.CoveredReply):
    """Images in base64, and what they cost."""

    created: int
    data: list[ImageData]
    output_format: content.ImageFormat
    size: str
    seed: int
    usage: ImageUsage


@router.post("/images/generations", tags=["images"])
async def generate(body: GenerationBody, call: ThisCall) -> Images:
    """Images from a text."""
    _check(call.server, body)
    parts = content.text_prompt(call.server.loaded, "text_to_image", body.prompt)
    request = CodesRequest(modality="image", parts=parts)
    return await _answer(call, "images", request, body)


@router.post("/images/edits", tags=["images"])
async def edit(body: Annotated[EditBody, Form(media_type="multipart/form-data")], call: ThisCall) -> Images:
    """Generates what the mask leaves transparent; the rest is the image, resized to the square that the model reads."""
    _check(call.server, body)
    limits = call.server.limits
    files = [file for file in (body.image, *body.listed) if file is not None]
    if len(files) != 1:
        raise BadRequestError("image is a list: send one image" if files else "image is missing: add it", "image")
    source = content.check_image(await files[0].read(), limits, "image")
    mask_file = content.check_image(await body.mask.read(), limits, "mask") if body.mask is not None else None
    region = await asyncio.to_thread(content.edit_mask, mask_file, source, limits.pixels)
    part = Part("image", source, {"mask_box": region})
    parts: tuple[Part, ...] = (part, Part("text", " " + body.prompt))
    if region is not None:
        parts = content.part_prompt("image_inpainting", part, content.language_of(body.prompt))
    mask = (0.0, 0.0, 1.0, 1.0) if region is None else region
    request = CodesRequest(modality="image", parts=parts, source=source, mask=mask)
    return await _answer(call, "edits", request, body)


def _check(server: Server, body: GenerationBody) -> None:
    server.check_model(body.model)
    side = server.loaded.image.side
    if body.size not in (None, "auto", f"{side}x{side}"):
        raise BadRequestError(f"size {body.size[:20]!r} is not offered: use auto or {side}x{side}", "size")
    if body.stream:
        raise BadRequestError("stream is not offered for images: leave it out", "stream")
    check_limit("n", body.n or 1, server.limits.answers)
    check_limit("prompt", len(body.prompt), server.limits.characters, "characters")


async def _answer(call: Call, kind: str, request: CodesRequest, body: GenerationBody) -> Images:
    """Ask for `n` images, each with a seed of its own."""
    form, seed = body.output_format or "png", schemas.chosen_seed(body.seed)
    samplings = [
        schemas.masked_sampling(body.steps, body.guidance, schemas.seed_of(seed, index)) for index in range(body.n or 1)
    ]
    answers = await call.answer(kind, [replace(request, sampling=sampling) for sampling in samplings])
    files = await asyncio.to_thread(_files, call.server, request, answers, form)
    side, used = call.server.loaded.image.side, schemas.usage_of(answers)
    image_tokens = used.prompt_tokens_details.image_tokens
    details = InputDetails(image_tokens=image_tokens, text_tokens=used.prompt_tokens - image_tokens)
    reply = Images(
        created=int(time.time()),
        data=[ImageData(b64_json=base64.b64encode(data).decode()) for data in files],
        output_format=form,
        size=f"{side}x{side}",
        seed=seed,
        usage=ImageUsage(
            input_tokens=used.prompt_tokens,
            output_tokens=used.completion_tokens,
            total_tokens=used.total_tokens,
            input_tokens_details=details,
        ),
    )
    return reply.with_coverage([request] * len(answers), answers, call.server.loaded.description)


def _files(server: Server, request: CodesRequest, answers: list[Answer], form: content.ImageFormat) -> list[bytes]:
    if not isinstance(request.mask, np.ndarray):  # all of it was drawn
        request = replace(request, mask=None)
    images: list[Any] = [decode_codes(request, answer.value, server.loaded) for answer in answers]
    return [content.image_file(drawn, form) for drawn in images]


class SpeechBody(BaseModel):
    """Text to speech. The model has one voice of its own: `voice` is accepted and changes nothing."""

    input: str = Field(min_length=1, max_length=4096)
    model: str | None = None
    voice: str | None = None
    response_format: content.AudioFormat | Literal["aac"] | None = Field(default=None, description="mp3 by default")
    speed: float | None = Field(default=None, ge=0.25, le=4.0)
    stream_format: Literal["audio", "sse"] | None = None
    seconds: float | None = Field(default=None, gt=0, le=30)
    seed: schemas.Seed = None
    steps: schemas.Steps | None = None
    guidance: schemas.Guidance | None = None


class TranscriptionBody(BaseModel):
    """`prompt` replaces the prompt of the task."""

    file: UploadFile = Field(description="WAV, FLAC, Ogg or MP3")
    model: str | None = None
    language: Literal["en", "zh"] = "en"
    prompt: str | None = Field(default=None, max_length=20_000)
    response_format: Literal["json", "text"] = "json"
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    stream: bool = False


class TranscriptionUsage(schemas.MediaUsage):
    type: Literal["tokens"] = "tokens"


class Transcription(schemas.EnergyReply):
    """The text of an audio file."""

    text: str
    usage: TranscriptionUsage


@router.post("/audio/speech", tags=["audio"], response_class=Response, responses={200: {"content": AUDIO}})
async def speak(body: SpeechBody, call: ThisCall) -> Response:
    """An audio file of the text; its joules and seed are in the headers x-joules and x-seed."""
    server, form = call.server, body.response_format or "mp3"
    server.check_model(body.model)
    if form == "aac":
        raise BadRequestError(
            "response_format aac cannot be written: use mp3, opus, flac, wav or pcm", "response_format"
        )
    if body.speed not in (None, 1.0):
        raise BadRequestError("speed other than 1 is not offered: leave it out", "speed")
    if body.stream_format == "sse":
        raise BadRequestError("stream_format sse is not offered: use audio", "stream_format")
    check_limit("seconds", body.seconds or 0.0, server.limits.audio_seconds)
    check_limit("input", len(body.input), server.limits.characters, "characters")
    seed = schemas.chosen_seed(body.seed)
    request = CodesRequest(
        modality="audio",
        parts=content.text_prompt(server.loaded, "text_to_speech", body.input),
        duration=body.seconds,
        sampling=schemas.masked_sampling(body.steps, body.guidance, seed),
    )
    [answer] = await call.answer("speech", [request])
    samples = await asyncio.to_thread(server.loaded.audio.decode, answer.value)
    data = await asyncio.to_thread(content.audio_file, samples, form)
    headers = {"x-seed": str(seed), "x-sample-rate": str(RATE)}
    if answer.joules is not None:
        headers |= {"x-joules": f"{answer.joules:.6g}", "x-joules-source": answer.energy_source or ""}
    return Response(data, media_type=content.AUDIO_TYPES[form], headers=headers)


@router.post("/audio/transcriptions", tags=["audio"], response_model=Transcription, responses={200: {"content": TEXT}})
async def transcribe(
    body: Annotated[TranscriptionBody, Form(media_type="multipart/form-data")], call: ThisCall
) -> Transcription | Response:
    """Text of speech in an audio file."""
    call.server.check_model(body.model)
    if body.stream:
        raise BadRequestError("stream is not offered for transcriptions: leave it out", "stream")
    limits, loaded = call.server.limits, call.server.loaded
    check_limit("prompt", len(body.prompt or ""), limits.characters, "characters")
    data = await body.file.read()
    try:
        samples = await asyncio.to_thread(read_audio, data, limits.audio_seconds)
    except DataError as error:
        raise BadRequestError(f"file: {error}", "file") from None
    question = Question(output="text", audio=data, text=body.prompt or None, language=body.language)
    # A model may transcribe by a task of its own, as in the turns of a chat.
    tasks = [loaded.tasks[one.task] for one in loaded.description.trained_tasks if one.task in loaded.tasks]
    own = "speech_recognition" not in {task.name for task in tasks}
    if body.prompt or (own and trained_prompt(question, loaded) is not None):
        parts = tuple(await asyncio.to_thread(prompt_parts, question, loaded))
    else:
        parts = content.part_prompt("speech_recognition", Part("audio", samples), body.language)
    heard = [task for task in tasks if (task.input_modality, task.output_modality) == ("audio", "text")]
    longest = max((getattr(task.target, "max_tokens", MAX_TOKENS) for task in heard), default=MAX_TOKENS)
    sampling = Sampling(temperature=body.temperature, max_tokens=min(longest, limits.tokens))
    [answer] = await call.answer("transcriptions", [TextRequest(parts=parts, sampling=sampling)])
    text = answer.value.strip()
    if body.response_format == "text":
        return PlainTextResponse(text)
    read, generated = answer.usage.prompt, answer.usage.generated
    usage = TranscriptionUsage(input_tokens=read, output_tokens=generated, total_tokens=read + generated)
    return Transcription(text=text, usage=usage).with_energy([answer])
