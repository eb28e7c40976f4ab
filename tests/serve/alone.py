"""A request answered without a running engine, by the functions that the command line uses: the engine must agree."""

from __future__ import annotations

from typing import Any

from openm6.inference.engine import embed_tokens, generate_texts, predict_distributions, score_rows
from openm6.inference.load import LoadedModel
from openm6.inference.masked import decode_masked
from openm6.inference.prefill import prefill
from openm6.serve.requests import CodesRequest, EmbedRequest, NumbersRequest, Request, TextRequest, prepare


def answer_alone(loaded: LoadedModel, request: Request, max_length: int = 4096) -> Any:
    """The value of a request's answer, as in `openm6.serve.requests.Answer`; stop strings are not looked for."""
    prepared, omni = prepare(request, loaded, max_length), loaded.omni
    if isinstance(request, TextRequest):
        return generate_texts(loaded, [prepared.prompt], request.sampling)[0]
    if isinstance(request, CodesRequest):
        return decode_masked(omni, [prepared.prompt], prepared.targets, request.sampling)[0].cpu()
    if isinstance(request, NumbersRequest):
        return predict_distributions(omni, [prepared.prompt], prepared.targets)[0]
    if isinstance(request, EmbedRequest):
        return embed_tokens(loaded, [prepared.prompt])[0]
    cache = omni.backbone.new_cache(1, prepared.prompt_length)
    position, _ = prefill(omni, prepared.prompt, cache, 0)
    nll = score_rows(omni, cache, [0], [position], [prepared.targets])[0].tolist()
    return list(zip(nll, map(len, prepared.targets), strict=True))
