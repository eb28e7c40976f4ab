"""A request answered by itself, with nothing else going on: the plain loop that the engine must agree with."""

from __future__ import annotations

from typing import Any

from openm6.evaluate.likelihood import sequence_nats
from openm6.generate.embed import embed_tokens
from openm6.generate.load import Loaded
from openm6.generate.masked import fill_codes
from openm6.generate.numbers import predict
from openm6.generate.text import write
from openm6.modalities.sequence import lay_out
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
        return candidate_nats(loaded, prepared)
    return embed_tokens(loaded, [prepared.prompt])[0]


def candidate_nats(loaded: Loaded, prepared: Prepared) -> list[tuple[float, int]]:
    """Negative log-likelihood of each candidate and its number of tokens."""
    sequences = [lay_out([*prepared.prompt, candidate]) for candidate in prepared.wanted]
    nats = sequence_nats(loaded.omni, sequences)
    # A sequence's weights average over its learned tokens; likelihoods are sums, as `sequence_nats` gives them.
    return [(float(found), len(wanted)) for found, wanted in zip(nats, prepared.wanted, strict=True)]
