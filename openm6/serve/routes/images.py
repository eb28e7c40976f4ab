"""`/v1/images/generations` and `/v1/images/edits`: images from text, and inpainting within a mask."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Form, UploadFile
from pydantic import BaseModel, Field

from openm6.inference.sampling import MaskedSampling
from openm6.modalities.interface import Part
from openm6.serve.content import (
    ImageFormat,
    check_image,
    edit_mask,
    image_file,
    language_of,
    part_prompt,
    restore_outside,
    text_prompt,
)
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit
from openm6.serve.middleware import StrictRoute
from openm6.serve.requests import Answer, CodesRequest
from openm6.serve.schemas import CoveredReply, Guidance, MediaUsage, Seed, Steps, chosen_seed, seed_of, usage_of
from openm6.serve.server import Call, Server, ThisCall

router = APIRouter(prefix="/v1/images", tags=["images"], route_class=StrictRoute, responses=DOCUMENTED)


class GenerationBody(BaseModel):
    """What to draw. `steps`, `guidance` and `seed` are ours; the rest is OpenAI's."""

    prompt: str = Field(min_length=1, max_length=20_000)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=8)
    size: str | None = Field(default=None, description="auto, or the model's own size, such as 64x64")
    response_format: Literal["b64_json"] | None = None
    output_format: ImageFormat | None = None
    seed: Seed = None
    steps: Steps = 8
    guidance: Guidance = 2.0


class EditBody(GenerationBody):
    """What to draw where the mask is transparent; without a mask, everywhere."""

    image: UploadFile
    mask: UploadFile | None = None


class ImageData(BaseModel):
    b64_json: str


class InputDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class ImageUsage(MediaUsage):
    input_tokens_details: InputDetails


class Images(CoveredReply):
    """Images in base64, and what they cost."""

    created: int
    data: list[ImageData]
    output_format: ImageFormat
    size: str
    seed: int
    usage: ImageUsage


@router.post("/generations")
async def generate(body: GenerationBody, call: ThisCall) -> Images:
    """Images from a text."""
    _check(call.server, body)
    request = CodesRequest(modality="image", parts=text_prompt(call.server.loaded, "text_to_image", body.prompt))
    return await _answer(call, "images", request, body)


@router.post("/edits")
async def edit(body: Annotated[EditBody, Form(media_type="multipart/form-data")], call: ThisCall) -> Images:
    """Generates what the mask leaves transparent; the rest is returned unchanged, pixel by pixel."""
    _check(call.server, body)
    limits = call.server.limits
    source = check_image(await body.image.read(), limits, "image")
    mask_file = check_image(await body.mask.read(), limits, "mask") if body.mask is not None else None
    region = await asyncio.to_thread(edit_mask, mask_file, source, limits.pixels)
    part = Part("image", source, {"mask_box": region})
    parts: tuple[Part, ...] = (part, Part("text", " " + body.prompt))
    if region is not None:
        parts = part_prompt("image_inpainting", part, language_of(body.prompt))
    mask = (0.0, 0.0, 1.0, 1.0) if region is None else region
    request = CodesRequest(modality="image", parts=parts, source=source, mask=mask)
    return await _answer(call, "edits", request, body)


def _check(server: Server, body: GenerationBody) -> None:
    server.check_model(body.model)
    side = server.loaded.image.side
    if body.size not in (None, "auto", f"{side}x{side}"):
        raise BadRequestError(f"size {body.size[:20]!r} is not offered: use auto or {side}x{side}", "size")
    check_limit("n", body.n, server.limits.answers)


async def _answer(call: Call, kind: str, request: CodesRequest, body: GenerationBody) -> Images:
    """Ask for `n` images, each with a seed of its own."""
    form, seed = body.output_format or "png", chosen_seed(body.seed)
    samplings = [
        MaskedSampling(steps=body.steps, guidance=body.guidance, seed=seed_of(seed, index)) for index in range(body.n)
    ]
    answers = await call.answer(kind, [replace(request, sampling=sampling) for sampling in samplings])
    files = await asyncio.to_thread(_files, call.server, request, answers, form)
    side, used = call.server.loaded.image.side, usage_of(answers)
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


def _files(server: Server, request: CodesRequest, answers: list[Answer], form: ImageFormat) -> list[bytes]:
    image = server.loaded.image
    images = [image.decode(answer.value) for answer in answers]
    if request.source is not None and isinstance(request.mask, np.ndarray):
        images = [restore_outside(drawn, request.source, request.mask, image) for drawn in images]
    return [image_file(drawn, form) for drawn in images]
