"""Raw parts to tokens, before the engine sees them: decoding and checking happen here, in threads of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from openm6.base.errors import DataError
from openm6.inference.load import LoadedModel
from openm6.modalities.interface import Segment
from openm6.modalities.numbers import NumberSeries
from openm6.modalities.registry import source_segments
from openm6.serve.requests import (
    CodesRequest,
    EmbedRequest,
    NumbersRequest,
    RankRequest,
    Request,
    TextRequest,
)

MODALITY_OF = {"text": "text", "image_in": "image", "sound_in": "audio", "numbers_in": "numbers"}


@dataclass(frozen=True)
class Prepared:
    """A request as tokens: the prompt, and what is wanted (several pieces where candidates are ranked)."""

    request: Request
    prompt: list[Segment]
    wanted: list[Segment]

    @property
    def read(self) -> dict[str, int]:
        """Tokens of the prompt by modality."""
        found: Counter[str] = Counter()
        for piece in self.prompt:
            found[MODALITY_OF[piece.kind]] += len(piece)
        return dict(found)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return sum(map(len, self.prompt))

    @property
    def work(self) -> int:
        """Tokens that answering will run through the model, at most: what queues and fairness count."""
        given = sum(map(len, self.wanted))
        if isinstance(self.request, TextRequest):
            given = self.request.sampling.max_tokens
        if isinstance(self.request, CodesRequest):
            sampling = self.request.sampling
            given *= sampling.steps * (2 if sampling.guidance > 0 else 1)
        return self.length + given


def prepare(request: Request, loaded: LoadedModel, room: int) -> Prepared:
    """Tokens of a request.

    Raises:
        DataError: a part is broken or out of bounds, or prompt and answer need more than `room` tokens.
    """
    prompt = [piece for piece in source_segments(request.parts, loaded.modalities) if len(piece)]
    prepared = Prepared(request, prompt, _wanted(request, loaded))
    longest = max((len(piece) for piece in prepared.wanted), default=0)
    if isinstance(request, TextRequest):
        longest = request.sampling.max_tokens
    if not prompt and not isinstance(request, CodesRequest):
        raise DataError("nothing is given: add a text, a picture, a sound or numbers")
    if prepared.length + longest + 1 > room:
        raise DataError(
            f"{prepared.length} tokens to read and {longest} to give exceed the {room} that one request may have: "
            f"shorten it"
        )
    return prepared


def _wanted(request: Request, loaded: LoadedModel) -> list[Segment]:
    if isinstance(request, CodesRequest):
        return [_canvas(request, loaded)]
    if isinstance(request, NumbersRequest):
        return [loaded.numbers.target(_queries(request, loaded))]
    if isinstance(request, RankRequest):
        return [loaded.text.target(candidate) for candidate in request.candidates]
    assert isinstance(request, TextRequest | EmbedRequest)
    return []


def _canvas(request: CodesRequest, loaded: LoadedModel) -> Segment:
    """Codes to fill in: all, or those of the hole or gap in what is given."""
    if request.want == "image":
        if request.given is None:
            return loaded.image.blank()
        return loaded.image.target(request.given, options={"hole": request.hole})
    if request.given is None:
        return loaded.sound.blank(request.duration)
    return loaded.sound.target(request.given, options={"gap": request.gap, "seconds": request.duration})


def _queries(request: NumbersRequest, loaded: LoadedModel) -> NumberSeries | dict[str, float]:
    """Any value that is not missing marks what is asked for."""
    if request.series is not None:
        return NumberSeries(request.series, [loaded.numbers.scale(request.series)[0]] * request.ahead)
    return {name: loaded.numbers.scale(name)[0] for name in request.columns}
