"""A request answered without a running engine, by the functions that the command line uses: the engine must agree."""

from __future__ import annotations

from typing import Any

from openm6.inference.engine import candidate_nats, embed_tokens, predict, write
from openm6.inference.load import Loaded
from openm6.inference.masked import fill_codes
from openm6.inference.prefill import read_into
from openm6.serve.requests import CodesRequest, EmbedRequest, NumbersRequest, Request, TextRequest, prepare


def answer_alone(loaded: Loaded, request: Request, room: int = 4096) -> Any:
    """The value of a request's answer, as in `openm6.serve.requests.Answer`; stop strings are not looked for."""
    prepared, omni = prepare(request, loaded, room), loaded.omni
    if isinstance(request, TextRequest):
        return write(loaded, [prepared.prompt], request.sampling)[0]
    if isinstance(request, CodesRequest):
        return fill_codes(omni, [prepared.prompt], prepared.targets, request.sampling)[0].cpu()
    if isinstance(request, NumbersRequest):
        return predict(omni, [prepared.prompt], prepared.targets)[0]
    if isinstance(request, EmbedRequest):
        return embed_tokens(loaded, [prepared.prompt])[0]
    cache = omni.backbone.new_cache(1, prepared.prompt_length)
    place, _ = read_into(omni, prepared.prompt, cache, 0)
    nats = candidate_nats(omni, cache, 0, place, prepared.targets)
    return list(zip(nats, map(len, prepared.targets), strict=True))
