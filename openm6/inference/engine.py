"""The inference engine: many prompts answered side by side, for the command line, the evaluation and the server.

A generated token passes through four files:

1. `generate_scored` here (in the server: serve/worker.py) adds prompts to the batch while slots are free;
2. `DecodeBatch.step` in decode_batch.py runs one step of all sequences and samples a token for each;
3. `DecodeStep` in decode.py computes one token per sequence through all layers, with the weights of models/ and nn/;
4. `SlotCache` in nn/cache.py holds the keys and values.

Its prompt was run through the model by prefill.py. Images and audio are decoded by masked.py; numbers, candidates and
embeddings take a single pass, below.
"""

# Shapes: B prompts, T queries of a row, P values of a query, N candidates, S tokens of a pass, R rows of a pass,
# E size of an embedding, D hidden size

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openm6.inference.decode import TextHead
from openm6.inference.decode_batch import DecodeBatch, DecodeSequence
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import Prompt, passes_of, prefill_all, prompt_length, run_block
from openm6.inference.sampling import Sampling
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part, Segment
from openm6.modalities.numbers import NumbersOut
from openm6.modalities.pool import POOL, pooled
from openm6.modalities.registry import opened, source_segments, split_opening
from openm6.modalities.series import SeriesOut
from openm6.modalities.text import Text
from openm6.models.omni import Omni
from openm6.nn.cache import SlotCache, SlotReader
from openm6.ops.sequence import SequenceMeta

# Texts decoded side by side.
BATCH = 32
# Bounds of a pass of candidates (one row) or embeddings.
ROW_TOKENS, MAX_ROWS = 512, 4
# Shown by the tokenizer for a character whose bytes are incomplete.
PARTIAL = "\N{REPLACEMENT CHARACTER}"


def generate_texts(loaded: LoadedModel, prompts: list[Prompt], sampling: Sampling) -> list[str]:
    """Return the text that follows each prompt, up to its end token or `max_tokens`; row i draws from seed + i."""
    return [text for text, _ in generate_scored(loaded, prompts, sampling)]


def generate_scored(
    loaded: LoadedModel, prompts: list[Prompt], sampling: Sampling, indices: Sequence[int] = ()
) -> list[tuple[str, float]]:
    """As `generate_texts`, with the geometric mean probability of the tokens of each text, its end token among them.

    `indices`, which ascend, replace those of the rows in their seeds.
    """
    found: dict[int, tuple[str, float]] = {}
    for _, ended in _decode(loaded, prompts, sampling, indices):
        for row in ended:
            # Decoding leaves the end token out.
            found[row.key] = loaded.text.decode(row.tokens), row.confidence
    return [found[index] for index in sorted(found)]


def stream_text(loaded: LoadedModel, prompt: Prompt, sampling: Sampling) -> Generator[str, None, float]:
    """Yield the text that follows a prompt as it is generated; return its confidence. See `generate_scored`."""
    shown, confidence = "", 0.0
    for (row,), ended in _decode(loaded, [prompt], sampling):
        text, _ = visible_text(loaded.text, row, (), bool(ended))
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
        confidence = row.confidence
    return confidence


def _decode(
    loaded: LoadedModel, prompts: list[Prompt], sampling: Sampling, indices: Sequence[int] = ()
) -> Iterator[tuple[list[DecodeSequence], list[DecodeSequence]]]:
    """Decode a text after each prompt; yield after each step what is being decoded, and what of it has ended."""
    text_head = TextHead.of(loaded.omni, loaded.text)
    split = list(map(split_opening, prompts))
    longest = max((prompt_length(prompt) for prompt, _ in split), default=0)
    # On a GPU each size of a pass is captured in a graph of its own, which one call would seldom replay: use one size.
    one_size = loaded.omni.device.type == "cuda"
    size = min(BATCH, max(1, len(prompts)))
    batch = DecodeBatch(text_head, size, longest + sampling.max_tokens + 2, one_size, compiled=loaded.compiled)
    waiting = list(zip(indices or range(len(prompts)), split, strict=True))
    while waiting or batch.rows:
        joining, waiting = waiting[: batch.free], waiting[batch.free :]
        positions = prefill_all(loaded.omni, [prompt for _, (prompt, _) in joining], batch.cache, batch.next_slot)
        for (index, (prompt, opening)), position in zip(joining, positions, strict=True):
            own = sampling.model_copy(update={"seed": sampling.seed + index})
            batch.add(index, own, position, loaded.text.start if opening is None else opening, prompt=prompt)
        ended = batch.step()
        yield list(batch.rows), ended
        for row in ended:
            batch.remove(row)


def visible_text(text: Text, row: DecodeSequence, stop: tuple[str, ...], ended: bool) -> tuple[str, bool]:
    """Return what may be shown of a row's text, and whether a stop string has ended it.

    Until it has ended, partial characters and what may become a stop string are left out.
    """
    tokens = row.tokens[:-1] if row.tokens and row.tokens[-1] in text.ends else row.tokens
    written = text.decode(tokens)
    found = [index for word in stop if (index := written.find(word)) >= 0]
    if found:
        return written[: min(found)], True
    if ended:
        return written, False
    written = written.rstrip(PARTIAL)
    begun = (size for word in stop for size in range(1, len(word)) if written.endswith(word[:size]))
    return written[: len(written) - max(begun, default=0)], False


def predict_distributions(omni: Omni, prompts: list[Prompt], targets: list[Segment]) -> list[Histogram]:
    """Return, for each prompt, the distributions of the observed values of its target, in order."""
    cache = omni.backbone.new_cache(len(prompts), max(map(prompt_length, prompts), default=0))
    positions = prefill_all(omni, prompts, cache)
    answers: dict[int, Histogram] = {}
    # The rows of a pass have equally many queries of one kind.
    sizes = [(target.kind, len(target)) for target in targets]
    for size in sorted(set(sizes)):
        rows = [row for row, found in enumerate(sizes) if found == size]
        starts, queries = [positions[row] for row in rows], [targets[row] for row in rows]
        answers |= zip(rows, predict_numbers(omni, cache, rows, starts, queries), strict=True)
    return [answers[row] for row in range(len(prompts))]


@torch.inference_mode()
def predict_numbers(
    omni: Omni, cache: SlotCache, slots: list[int], positions: list[int], targets: list[Segment]
) -> list[Histogram]:
    """As `predict_distributions` for prompts in slots, which stay as they are, and targets of one length after them."""
    adapter = omni.adapter(targets[0].kind)
    joined = {name: np.concatenate([target.arrays[name] for target in targets]) for name in targets[0].arrays}
    arrays = {name: torch.from_numpy(array).to(omni.device) for name, array in joined.items()}
    hidden = run_block(omni, cache, list(slots), positions, targets[0], arrays)  # B T D
    assert isinstance(adapter, (NumbersOut, SeriesOut))
    return adapter.histograms(hidden, arrays)


@torch.inference_mode()
def score_rows(
    omni: Omni, cache: SlotCache, slots: list[int], positions: list[int], candidates: list[list[Segment]]
) -> np.ndarray:
    """Return the nats of each text after the prompt in its slot, which stays as it is, from its position on.  # -> B N

    Candidates, in private blocks of a row, have the same lengths for all slots.
    """
    first = candidates[0]
    found = []
    for few in passes_of(range(len(first)), lambda index: len(first[index]), ROW_TOKENS):
        pairs = zip(candidates, positions, strict=True)
        rows = [[build_sequence([own[index]], position=position) for index in few] for own, position in pairs]
        batch = collate(rows, sum(len(first[index]) for index in few)).to(omni.device)
        example_id = batch.meta.example_id
        # All belong to the example of the prompt, each to its own block.
        meta = SequenceMeta(torch.zeros_like(example_id), batch.meta.attn_order, example_id + 1, batch.meta.positions)
        hidden, _ = omni(batch.groups, meta, SlotReader(cache, list(slots)))  # B S D
        group = batch.groups["text"]
        nll = omni.text.nll(hidden.flatten(0, 1)[group.index], group.arrays).float()
        total = nll.new_zeros(len(slots) * len(few)).index_add_(0, group.example, nll)
        found.append(total.view(len(slots), -1).double().cpu().numpy())
    return np.concatenate(found, 1)


@dataclass(frozen=True)
class RankedText:
    """A candidate and its place in the list; the score is its log-likelihood in nats, by default per token."""

    index: int
    candidate: str
    log_likelihood: float
    score: float


def score_texts(loaded: LoadedModel, prompts: list[Prompt], candidates: list[Segment]) -> np.ndarray:
    """Return the negative log-likelihood, in nats, of each candidate after each prompt.  # B, N -> B N"""
    found = [np.zeros((0, len(candidates)))]
    together = max(1, ROW_TOKENS * MAX_ROWS // sum(map(len, candidates)))
    for start in range(0, len(prompts), min(BATCH, together)):
        split = [split_opening(prompt) for prompt in prompts[start : start + min(BATCH, together)]]
        few = [prompt for prompt, _ in split]
        cache = loaded.omni.backbone.new_cache(len(few), max(map(prompt_length, few)))
        positions = prefill_all(loaded.omni, few, cache)
        own = [[opened(candidate, opening) for candidate in candidates] for _, opening in split]
        found.append(score_rows(loaded.omni, cache, list(range(len(few))), positions, own))
    return np.concatenate(found)


def rank_texts(texts: Sequence[str], nll: Sequence[float], lengths: Sequence[int], normalize: bool) -> list[RankedText]:
    """Return texts with their scores, the best first, from the nats and the number of tokens of each."""
    found = [
        RankedText(index, text, -total, -total / length if normalize else -total)
        for index, (text, total, length) in enumerate(zip(texts, nll, lengths, strict=True))
    ]
    return sorted(found, key=lambda ranked: -ranked.score)


def embed(loaded: LoadedModel, inputs: Sequence[list[Part]]) -> np.ndarray:
    """Return the embedding of each input, of length 1; ConfigError: not trained to; DataError: a bad one.  # -> B E"""
    return embed_tokens(loaded, [source_segments(parts, loaded.modalities) for parts in inputs])


@torch.inference_mode()
def embed_tokens(loaded: LoadedModel, inputs: Sequence[list[Segment]]) -> np.ndarray:
    """As `embed`, of inputs that are source tokens already.  # -> B E"""
    pool = loaded.pool
    found = [np.zeros((0, pool.size), np.float32)]
    sequences = [build_sequence(pooled(segments)) for segments in inputs]
    packed = passes_of(sequences, len, ROW_TOKENS)
    for start in range(0, len(packed), MAX_ROWS):
        rows = packed[start : start + MAX_ROWS]
        batch = collate(rows, max(sum(map(len, row)) for row in rows)).to(loaded.omni.device)
        hidden, _ = loaded.omni(batch.groups, batch.meta)  # R S D
        vectors = pool.vectors(hidden.flatten(0, 1)[batch.groups[POOL].index])
        found.append(vectors.cpu().numpy())
    return np.concatenate(found)
