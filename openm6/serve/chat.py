"""A chat's body as requests to the engine, and the engine's answers as messages."""

from __future__ import annotations

import base64
import time
import uuid
from dataclasses import replace

from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.serve.chat_schemas import (
    UNSUPPORTED,
    AnswerAudio,
    AnswerImage,
    AnswerMessage,
    ChatBody,
    DataURL,
    Logprobs,
    NumbersSettings,
    PictureSettings,
    Rival,
    SoundSettings,
    TokenLogprob,
    Wanted,
)
from openm6.serve.content import parts_of_messages
from openm6.serve.distributions import described
from openm6.serve.errors import BadRequestError
from openm6.serve.media import as_data_url, write_picture, write_sound
from openm6.serve.requests import Answer, CodesRequest, NumbersRequest, Request, Scored, TextRequest
from openm6.serve.schemas import seed_of
from openm6.serve.state import Server

TOKENS = 64  # given unless the client says otherwise
KEPT = 3600  # seconds that OpenAI keeps a sound; ours is in the answer, and nothing is kept


def refuse_unsupported(body: ChatBody) -> None:
    """Raises BadRequestError where a field asks for something that is known and not offered."""
    for name, value in (body.model_extra or {}).items():
        neutral = UNSUPPORTED.get(name)
        if neutral is None or value is None or value in ([], {}, *neutral):
            continue
        instead = " 'text' alone is offered" if name == "response_format" else " leave it out"
        raise BadRequestError(f"{name} is not supported:{instead}", name)


def wanted_modalities(body: ChatBody) -> list[Wanted]:
    """Each modality once, in the order asked for; text where nothing is said."""
    return list(dict.fromkeys(body.modalities or ["text"]))


def requests_of(body: ChatBody, server: Server, client: str, seed: int) -> list[list[Request]]:
    """For each choice, one request for each modality wanted.

    Raises:
        BadRequestError: a field is out of bounds, or fields do not fit one another.
    """
    limits = server.config.limits
    if len(body.messages) > limits.messages or (body.n or 1) > limits.answers:
        raise BadRequestError(
            f"at most {limits.messages} messages and n={limits.answers} are offered", "messages"
        )
    apart = server.engine.loaded.modalities.reading == "parts"  # an earlier turn can then be used again
    parts = parts_of_messages(body.messages, limits, apart)
    if not parts:
        raise BadRequestError("the messages are empty: say something", "messages")
    common = Request(parts=parts, client=client, seconds=limits.seconds)
    wanted = wanted_modalities(body)
    return [
        [_request(kind, body, common, seed_of(seed, number), limits.tokens) for kind in wanted]
        for number in range(body.n or 1)
    ]


def _request(kind: Wanted, body: ChatBody, common: Request, seed: int, most: int) -> Request:
    if kind == "text":
        return _text(body, common, seed, most)
    if kind == "numbers":
        return _numbers(body.numbers or NumbersSettings(), common)
    draw = body.draw
    sampling = MaskedSampling(seed=seed)
    if draw is not None:
        sampling = MaskedSampling(seed=seed, steps=draw.steps, guidance=draw.guidance)
    return CodesRequest(
        parts=common.parts,
        client=common.client,
        seconds=common.seconds,
        want="image" if kind == "image" else "sound",
        sampling=sampling,
    )


def _text(body: ChatBody, common: Request, seed: int, most: int) -> TextRequest:
    tokens = body.max_completion_tokens or body.max_tokens or min(TOKENS, most)
    if tokens > most:
        name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        raise BadRequestError(f"{name}={tokens} exceeds {most}: ask for fewer", name)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > 4:
        raise BadRequestError(f"stop holds {len(stop)} strings, over 4: send fewer", "stop")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequestError("top_logprobs needs logprobs: set it to true", "top_logprobs")
    return TextRequest(
        parts=common.parts,
        client=common.client,
        seconds=common.seconds,
        sampling=Sampling(
            temperature=body.temperature or 0.0,
            top_k=body.top_k,
            top_p=body.top_p,
            max_tokens=tokens,
            seed=seed,
        ),
        stop=tuple(stop),
        top=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _numbers(settings: NumbersSettings, common: Request) -> NumbersRequest:
    """What is wanted is taken out of what is given: a column that is asked for must not be read."""
    series = [part.raw.name for part in common.parts if isinstance(part.raw, NumberSeries)]
    if settings.column is None and series:
        return NumbersRequest(
            parts=common.parts,
            client=common.client,
            seconds=common.seconds,
            series=series[-1],
            ahead=settings.ahead,
        )
    column = settings.column or _missing(common.parts)
    parts = tuple(_without(part, column) for part in common.parts)
    parts = tuple(part for part in parts if part.raw is not None and part.raw != {})
    if not parts:
        raise BadRequestError("nothing is left to predict from: give more than the wanted number", "messages")
    return NumbersRequest(parts=parts, client=common.client, seconds=common.seconds, columns=(column,))


def _missing(parts: tuple[Part, ...]) -> str:
    rows = [part.raw for part in parts if part.modality == "numbers" and isinstance(part.raw, dict)]
    missing = [name for row in rows for name, value in row.items() if value is None]
    if len(missing) != 1:
        raise BadRequestError(
            "say which number is wanted: numbers={'column': …}, or one value of null", "numbers"
        )
    return str(missing[0])


def _without(part: Part, column: str) -> Part:
    if part.modality != "numbers" or not isinstance(part.raw, dict):
        return part
    return replace(part, raw={name: value for name, value in part.raw.items() if name != column})


def message_of(
    body: ChatBody, server: Server, requests: list[Request], answers: list[Answer]
) -> AnswerMessage:
    """The answers of one choice as one message; pictures and sounds are unpacked here."""
    message = AnswerMessage()
    for kind, request, answer in zip(wanted_modalities(body), requests, answers, strict=True):
        if kind == "text":
            message.content = answer.value
        elif kind == "image":
            message.images = [_image(server, answer, body.image or PictureSettings())]
        elif kind == "audio":
            message.audio = _audio(server, answer, body.audio or SoundSettings())
        else:
            assert isinstance(request, NumbersRequest)
            name = request.series or request.columns[0]
            coverage = (body.numbers or NumbersSettings()).coverage
            message.numbers = {name: described(answer.value, coverage)}
    return message


def _image(server: Server, answer: Answer, settings: PictureSettings) -> AnswerImage:
    picture = server.engine.loaded.image.decode(answer.value)
    return AnswerImage(
        image_url=DataURL(url=as_data_url(write_picture(picture, settings.format), settings.format))
    )


def _audio(server: Server, answer: Answer, settings: SoundSettings) -> AnswerAudio:
    samples = server.engine.loaded.sound.decode(answer.value)
    return AnswerAudio(
        id=f"audio-{uuid.uuid4().hex}",
        data=base64.b64encode(write_sound(samples, settings.format)).decode(),
        expires_at=int(time.time()) + KEPT,
    )


def logprobs_of(scored: tuple[Scored, ...] | list[Scored]) -> Logprobs:
    """Scores of tokens in OpenAI's form."""
    return Logprobs(
        content=[
            TokenLogprob(
                token=token.text,
                logprob=token.log_probability,
                bytes=list(token.text.encode()),
                top_logprobs=[
                    Rival(token=text, logprob=value, bytes=list(text.encode()))
                    for text, value in token.rivals
                ],
            )
            for token in scored
        ]
    )
