"""A request answered by itself, with nothing else going on: the plain loop that the engine must agree with."""

from __future__ import annotations

from typing import Any

from openm6.generate.candidates import candidate_nats
from openm6.generate.decode import Speaker
from openm6.generate.embed import embed_tokens
from openm6.generate.load import Loaded
from openm6.generate.masked import fill_codes
from openm6.generate.numbers import predict
from openm6.generate.reading import PromptMemory, read_into
from openm6.generate.text import write
from openm6.nn.slots import SlotCache
from openm6.serve.prepare import Prepared, prepare
from openm6.serve.requests import CodesRequest, NumbersRequest, RankRequest, Request, TextRequest


def answer_alone(loaded: Loaded, request: Request, room: int = 4096) -> Any:
    """The value of the request's answer, by the functions of `openm6 generate`; stop strings are not looked for."""
    return value_alone(loaded, prepare(request, loaded, room))


def value_alone(loaded: Loaded, prepared: Prepared) -> Any:
    """The value of a prepared request's answer."""
    request = prepared.request
    if isinstance(request, TextRequest):
        return write(loaded, [prepared.prompt], request.sampling)[0]
    if isinstance(request, CodesRequest):
        return fill_codes(loaded.omni, [prepared.prompt], prepared.wanted, request.sampling)[0].cpu()
    if isinstance(request, NumbersRequest):
        return predict(loaded.omni, [prepared.prompt], prepared.wanted)[0]
    if isinstance(request, RankRequest):
        cache = Speaker.of(loaded.omni, loaded.text).new_slots(1, prepared.length)
        return judged_candidates(loaded, prepared, cache, 0)[0]
    return embed_tokens(loaded, [prepared.prompt])[0]


def judged_candidates(
    loaded: Loaded, prepared: Prepared, cache: SlotCache, slot: int, memory: PromptMemory | None = None
) -> tuple[list[tuple[float, int]], int]:
    """Each candidate's negative log-likelihood and number of tokens; and how many of the prompt's the memory spared.

    The slot is used for the prompt meanwhile.
    """
    place, known = read_into(loaded.omni, prepared.prompt, cache, slot, memory)
    nats = candidate_nats(loaded.omni, cache, slot, place, prepared.wanted)
    return list(zip(nats, map(len, prepared.wanted), strict=True)), known
