"""`/v1/images/generations` and `/v1/images/edits`: pictures from words, and pictures filled in where a mask says."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, File, Form, UploadFile
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field

from openm6.inference.sampling import MaskedSampling
from openm6.modalities.interface import Part
from openm6.serve.editing import hole_of_mask, kept_outside
from openm6.serve.errors import DOCUMENTED, BadRequestError
from openm6.serve.guard import StrictRoute
from openm6.serve.media import PictureFormat, check_picture, write_picture
from openm6.serve.replies import ask_all
from openm6.serve.requests import Answer, CodesRequest
from openm6.serve.schemas import MAX_SEED, Energy, chosen_seed, joules_of, seed_of
from openm6.serve.state import Server, ThisClient, ThisServer
from openm6.serve.teaching import Teaching, teaching_of
from openm6.serve.words import language_of, part_in_words, taught, text_in_words

router = APIRouter(prefix="/v1/images", tags=["images"], route_class=StrictRoute, responses=DOCUMENTED)
EVERYWHERE = (0.0, 0.0, 1.0, 1.0)


class Generation(BaseModel):
    """What to draw. `steps`, `guidance` and `seed` are ours; the rest is OpenAI's."""

    prompt: str = Field(min_length=1, max_length=20_000)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=8)
    size: str | None = Field(default=None, description="auto, or the model's own size, such as 64x64")
    response_format: Literal["b64_json"] | None = None
    output_format: PictureFormat | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int = Field(default=8, ge=1, le=64)
    guidance: float = Field(default=2.0, ge=0, le=20)


class Picture(BaseModel):
    b64_json: str


class InputDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class PictureUsage(BaseModel):
    """Tokens as OpenAI counts those of pictures."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails


class Pictures(Energy, Teaching):
    """Pictures in base64, and what they took."""

    created: int
    data: list[Picture]
    output_format: PictureFormat
    size: str
    seed: int
    usage: PictureUsage


@router.post("/generations")
async def generate(body: Generation, server: ThisServer, client: ThisClient, http: HTTPRequest) -> Pictures:
    """Pictures from a text."""
    _check(server, body.model, body.size, body.n)
    loaded = server.engine.loaded
    parts = text_in_words("draw", body.prompt) if taught(loaded, "draw") else (Part("text", body.prompt),)
    seed = chosen_seed(body.seed)
    asked = CodesRequest(
        want="image",
        parts=parts,
        client=client,
        seconds=server.config.limits.seconds,
        sampling=MaskedSampling(steps=body.steps, guidance=body.guidance, seed=seed),
    )
    answers = await ask_all(server, http, "images", _several(asked, body.n))
    form: PictureFormat = body.output_format or "png"
    files = await asyncio.to_thread(_files, server, answers, form, None, None)
    return _pictures(server, asked, answers, files, form)


@router.post("/edits")
async def edit(
    server: ThisServer,
    client: ThisClient,
    http: HTTPRequest,
    image: Annotated[UploadFile, File(description="the picture")],
    prompt: Annotated[str, Form(min_length=1, max_length=20_000)],
    mask: Annotated[
        UploadFile | None, File(description="transparent where the picture may change; none: everywhere")
    ] = None,
    model: Annotated[str | None, Form()] = None,
    n: Annotated[int, Form(ge=1, le=8)] = 1,
    size: Annotated[str | None, Form()] = None,
    response_format: Annotated[Literal["b64_json"] | None, Form()] = None,
    output_format: Annotated[PictureFormat | None, Form()] = None,
    seed: Annotated[int | None, Form(ge=0, le=MAX_SEED)] = None,
    steps: Annotated[int, Form(ge=1, le=64)] = 8,
    guidance: Annotated[float, Form(ge=0, le=20, allow_inf_nan=False)] = 2.0,
) -> Pictures:
    """Fills a picture in where the mask is transparent; what it keeps comes back as it was, pixel by pixel."""
    _check(server, model, size, n)
    pixels = server.config.limits.pixels
    given = check_picture(await image.read(), pixels, "image")
    covered = check_picture(await mask.read(), pixels, "mask") if mask is not None else None
    hole = await asyncio.to_thread(hole_of_mask, covered, given, pixels)
    asked = CodesRequest(
        want="image",
        parts=_parts_of_edit(given, hole, prompt),
        client=client,
        seconds=server.config.limits.seconds,
        given=given,
        hole=EVERYWHERE if hole is None else hole,
        sampling=MaskedSampling(steps=steps, guidance=guidance, seed=chosen_seed(seed)),
    )
    answers = await ask_all(server, http, "edits", _several(asked, n))
    form: PictureFormat = output_format or "png"
    files = await asyncio.to_thread(_files, server, answers, form, given, hole)
    return _pictures(server, asked, answers, files, form)


def _parts_of_edit(given: bytes, hole: np.ndarray | None, prompt: str) -> tuple[Part, ...]:
    """What is read: a picture with a hole as it was taught, else the picture and the words."""
    if hole is not None:
        return part_in_words("fill_picture", Part("image", given, {"hole": hole}), language_of(prompt))
    return Part("image", given, {"hole": None}), Part("text", " " + prompt)


def _several(asked: CodesRequest, count: int) -> list[CodesRequest]:
    """The same request with a seed of its own for each picture."""
    seeds = (seed_of(asked.sampling.seed, number) for number in range(count))
    return [replace(asked, sampling=asked.sampling.model_copy(update={"seed": seed})) for seed in seeds]


def _check(server: Server, model: str | None, size: str | None, n: int) -> None:
    server.check_model(model or "default")
    side = server.engine.loaded.image.side
    if size not in (None, "auto", f"{side}x{side}"):
        raise BadRequestError(f"size {size[:20]!r} is not offered: use auto or {side}x{side}", "size")
    if n > server.config.limits.answers:
        raise BadRequestError(f"n={n} exceeds {server.config.limits.answers}: ask for fewer", "n")


def _files(
    server: Server, answers: list[Answer], form: PictureFormat, given: bytes | None, hole: np.ndarray | None
) -> list[bytes]:
    image = server.engine.loaded.image
    pictures = [image.decode(answer.value) for answer in answers]
    if given is not None and hole is not None:
        pictures = [kept_outside(picture, given, hole, image) for picture in pictures]
    return [write_picture(picture, form) for picture in pictures]


def _pictures(
    server: Server, asked: CodesRequest, answers: list[Answer], files: list[bytes], form: PictureFormat
) -> Pictures:
    side = server.engine.loaded.image.side
    read = answers[0].usage
    given = sum(answer.usage.given for answer in answers)
    image_tokens = read.read.get("image", 0)
    joules, source = joules_of(answers)
    found, note = teaching_of([asked], answers[:1], server.engine.loaded.description)
    details = InputDetails(image_tokens=image_tokens, text_tokens=read.prompt - image_tokens)
    return Pictures(
        created=int(time.time()),
        data=[Picture(b64_json=base64.b64encode(data).decode()) for data in files],
        output_format=form,
        size=f"{side}x{side}",
        seed=asked.sampling.seed,
        usage=PictureUsage(
            input_tokens=read.prompt,
            output_tokens=given,
            total_tokens=read.prompt + given,
            input_tokens_details=details,
        ),
        joules=joules,
        joules_source=source,
        taught=found,
        note=note,
    )
