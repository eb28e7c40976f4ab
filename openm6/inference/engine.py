"""The inference engine: many prompts answered side by side, for the command line, the evaluation and the server.

One generated token is computed in four files: `generate_texts` here (in the server: worker.py), `DecodeBatch.step` in
text.py (the batch of sequences and the draw), `DecodeStep` in decode.py (one token through all layers with attention),
and `SlotCache` in nn/cache.py (keys and values). Prompts run through the model itself, by prefill.py; images and
audio are decoded by masked.py; numbers, candidates and embeddings take a single pass, below.
"""

# Shapes: B prompts, T queries of a row, P values of a query, N candidates, S tokens of a pass, R rows of a pass,
# E size of an embedding, D width

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from openm6.core.errors import ConfigError
from openm6.inference.decode import TextHead
from openm6.inference.graphs import open_batch
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import Prompt, prefill_all, prompt_length, run_block
from openm6.inference.sampling import Sampling
from openm6.inference.taught import confidence_of
from openm6.inference.text import DecodeSequence
from openm6.modalities.batch import PackedExample, build_sequence, collate
from openm6.modalities.interface import Part, Segment
from openm6.modalities.numbers import Histogram, NumbersOut
from openm6.modalities.pool import POOL, PoolAdapter, pooled
from openm6.modalities.registry import source_segments
from openm6.modalities.text import Text
from openm6.models.omni import Omni
from openm6.nn.cache import SlotCache
from openm6.ops.sequence import SequenceMeta

BATCH = 32  # texts decoded side by side
ROW_TOKENS, MAX_ROWS = 512, 4  # of a pass of candidates (one row) or embeddings


class GeneratedText(NamedTuple):
    """A text, and the geometric mean probability of its tokens, its end mark among them."""

    text: str
    confidence: float


def generate_texts(loaded: LoadedModel, prompts: list[Prompt], sampling: Sampling) -> list[str]:
    """Return the text that follows each prompt, up to its end mark or `max_tokens`; row i draws from seed + i."""
    return [generated.text for generated in generate_scored(loaded, prompts, sampling)]


def generate_scored(loaded: LoadedModel, prompts: list[Prompt], sampling: Sampling) -> list[GeneratedText]:
    """As `generate_texts`, with the confidence in each text."""
    text_head = TextHead.of(loaded.omni, loaded.text)
    longest = max(map(prompt_length, prompts), default=0)
    # On a GPU each size of a pass is captured in a graph of its own, which one call would seldom replay: use one size.
    one_size = loaded.omni.device.type == "cuda"
    size = min(BATCH, max(1, len(prompts)))
    rows = open_batch(text_head, size, longest + sampling.max_tokens + 2, deterministic=one_size)
    waiting, found = deque(range(len(prompts))), dict[int, GeneratedText]()
    while waiting or rows.rows:
        joining = [waiting.popleft() for _ in range(min(rows.free, len(waiting)))]
        positions = prefill_all(
            loaded.omni, [prompts[index] for index in joining], rows.cache, rows.next_slot
        )
        for index, position in zip(joining, positions, strict=True):
            own = sampling.model_copy(update={"seed": sampling.seed + index})
            rows.add(index, own, position, loaded.text.start)
        for row in rows.step():
            found[row.key] = _generated(loaded.text, row)
            rows.remove(row)
    return [found[index] for index in range(len(prompts))]


def _generated(text: Text, row: DecodeSequence) -> GeneratedText:
    tokens = row.tokens[:-1] if row.tokens[-1] == text.end else row.tokens
    return GeneratedText(text.decode(tokens), confidence_of(row.nll, len(row.tokens)))


def predict_distributions(omni: Omni, prompts: list[Prompt], targets: list[Segment]) -> list[Histogram]:
    """Return, for each prompt, the distributions of the observed values of its target, in order."""
    cache = omni.backbone.new_cache(len(prompts), max(map(prompt_length, prompts), default=0))
    positions = prefill_all(omni, prompts, cache)
    answers: dict[int, Histogram] = {}
    for length in sorted({len(tokens) for tokens in targets}):  # rows of one pass ask for equally many tokens
        rows = [row for row, tokens in enumerate(targets) if len(tokens) == length]
        asked = [targets[row] for row in rows]
        found = predict_numbers(omni, cache, rows, [positions[row] for row in rows], asked)
        answers |= zip(rows, found, strict=True)
    return [answers[row] for row in range(len(prompts))]


@torch.inference_mode()
def predict_numbers(
    omni: Omni, cache: SlotCache, slots: list[int], positions: list[int], targets: list[Segment]
) -> list[Histogram]:
    """As `predict_distributions` for prompts in slots, which stay as they are; all of `targets` have one length.

    `positions` are those after the prompts.
    """
    adapter = omni.adapter("numbers_out")
    assert isinstance(adapter, NumbersOut)
    arrays = {
        name: torch.from_numpy(np.concatenate([tokens.arrays[name] for tokens in targets])).to(omni.device)
        for name in targets[0].arrays
    }
    hidden = run_block(omni, cache, list(slots), positions, targets[0], arrays)  # B T D
    logits = adapter.logits(hidden.flatten(0, 1)).float()  # B*T P bins
    probability = logits.softmax(-1).unflatten(0, hidden.shape[:2]).flatten(1, 2)
    answers = []
    for row, tokens in zip(probability.cpu().numpy(), targets, strict=True):
        scale = np.repeat(tokens.arrays["scale"], tokens.arrays["observed"].shape[1], axis=0)  # T*P 2
        asked = tokens.arrays["observed"].reshape(-1)
        answers.append(Histogram(row[asked], scale[asked]))
    return answers


@torch.inference_mode()
def score_candidates(
    omni: Omni, cache: SlotCache, slot: int, position: int, candidates: list[Segment]
) -> list[float]:
    """Return the negative log-likelihood, in nats, of each text after the prompt in a slot, which stays as it is.  # N

    Candidates are private blocks of one row, so that none sees another. `position` is the one after the prompt.
    """
    found: list[float] = []
    for few in _candidate_passes(candidates):
        sequences = [build_sequence([tokens], position=position) for tokens in few]
        batch = collate([sequences], sum(map(len, few))).to(omni.device)
        example_id = batch.meta.example_id
        # All belong to the example of the prompt, each to its own block.
        meta = SequenceMeta(
            torch.zeros_like(example_id), batch.meta.attn_order, example_id + 1, batch.meta.positions
        )
        hidden, _ = omni(batch.groups, meta, cache.reader([slot]))  # 1 S D
        group = batch.groups["text"]
        nll = omni.text.nll(hidden[0, group.index], group.arrays).float()
        found += nll.new_zeros(len(few)).index_add_(0, group.example, nll).tolist()
    return found


def _candidate_passes(candidates: list[Segment]) -> Iterator[list[Segment]]:
    """Split candidates, in order, into passes of up to `ROW_TOKENS` tokens."""
    few: list[Segment] = []
    for tokens in candidates:
        if few and sum(map(len, few)) + len(tokens) > ROW_TOKENS:
            yield few
            few = []
        few.append(tokens)
    if few:
        yield few


def embedding_size(loaded: LoadedModel) -> int:
    """Return how many numbers an embedding of this model has.

    Raises:
        ConfigError: the model was not trained to embed.
    """
    return taught_pool(loaded).project.out_features


def taught_pool(loaded: LoadedModel) -> PoolAdapter:
    """The adapter that makes embeddings; raise ConfigError if the model was not trained to embed."""
    pool = loaded.omni.pool
    if pool is None:
        raise ConfigError(
            "this model makes no embeddings: it needs training on image_text_retrieval or audio_text_retrieval, "
            "as in recipes/embed.yaml"
        )
    return pool


def embed(loaded: LoadedModel, inputs: Sequence[list[Part]]) -> np.ndarray:
    """Return the embedding of each input (text, image, audio, or several parts together), of length 1.  # -> B E

    Raises:
        ConfigError: the model was not trained to embed.
        DataError: an input is empty, broken or out of bounds.
    """
    return embed_tokens(loaded, [source_segments(parts, loaded.modalities) for parts in inputs])


def embed_tokens(loaded: LoadedModel, inputs: Sequence[list[Segment]]) -> np.ndarray:
    """As `embed`, of inputs that are source tokens already.  # -> B E"""
    size = embedding_size(loaded)
    sequences = [build_sequence(pooled(segments)) for segments in inputs]
    found = [_vectors(loaded, rows) for rows in packed_rows(sequences)]
    return np.concatenate(found) if found else np.zeros((0, size), np.float32)


def packed_rows(sequences: list[PackedExample]) -> list[list[list[PackedExample]]]:
    """Split sequences, in order, into passes of a few rows."""
    passes: list[list[list[PackedExample]]] = []
    room = 0
    for sequence in sequences:
        if len(sequence) > room or not passes:
            if not passes or len(passes[-1]) == MAX_ROWS:
                passes.append([])
            passes[-1].append([])
            room = max(ROW_TOKENS, len(sequence))
        passes[-1][-1].append(sequence)
        room -= len(sequence)
    return passes


@torch.inference_mode()
def _vectors(loaded: LoadedModel, rows: list[list[PackedExample]]) -> np.ndarray:
    length = max(sum(map(len, row)) for row in rows)
    batch = collate(rows, length).to(loaded.omni.device)
    hidden, _ = loaded.omni(batch.groups, batch.meta)  # R S D
    index = batch.groups[POOL].index
    return taught_pool(loaded).vectors(hidden.flatten(0, 1)[index]).cpu().numpy()
