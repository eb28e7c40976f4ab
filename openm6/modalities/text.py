"""Text: byte-level BPE in and out; autoregressive as a target; there are no unknown tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from openm6.core.errors import ConfigError, DataError
from openm6.modalities.interface import (
    NO_OPTIONS,
    Adapter,
    Cuttable,
    Modality,
    Options,
    Part,
    Segment,
    line,
)
from openm6.modalities.truncation import cuttable_in, fit, select_tokens
from openm6.ops.losses import linear_cross_entropy

# Our own marks lie above the tokenizer's ids, so no text that a user writes can spell one.
NUM_MARKS = 3
START, END, HOLE = 0, 1, 2
GAP = "\N{OBJECT REPLACEMENT CHARACTER}"  # how a gap is written in a text on its way to HOLE


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learned from `texts`: every byte is a token, so no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer in the JSON `text` of a tokenizer.json.

    Raises:
        ConfigError: it is not one.
    """
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{where} is not a tokenizer.json: {error}") from None


class Text(Modality):
    """Reads and writes text through a tokenizer; START opens a target text, END closes it, HOLE stands for a gap."""

    name: ClassVar[str] = "text"

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = 2048) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        # Not the number of entries: a tokenizer of another maker may leave ids unused.
        self.first_mark = max(tokenizer.get_vocab().values(), default=-1) + 1
        # A multiple of 64 keeps the rows of the embedding aligned for the matrix units.
        self.vocabulary_size = -(-(self.first_mark + NUM_MARKS) // 64) * 64

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; each GAP becomes the HOLE mark."""
        return self._encode_with_offsets(text)[0]

    def _encode_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Token ids of `text`, and where in it each one starts and stops."""
        ids: list[int] = []
        starts: list[int] = []
        stops: list[int] = []
        position = 0
        for index, segment in enumerate(text.split(GAP)):
            if index:
                ids.append(self.first_mark + HOLE)
                starts.append(position)
                position += 1
                stops.append(position)
            encoding = self.tokenizer.encode(segment, add_special_tokens=False)
            ids.extend(encoding.ids)
            starts.extend(position + start for start, _ in encoding.offsets)
            stops.extend(position + stop for _, stop in encoding.offsets)
            position += len(segment)
        return ids, starts, stops

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` to the letter: a GAP, too, is a character like any other."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; our marks and unused ids are left out."""
        return self.tokenizer.decode([token for token in ids if token < self.first_mark])

    @property
    def end(self) -> int:
        """The id that closes a target text."""
        return self.first_mark + END

    @property
    def start(self) -> int:
        """The id that opens a target text."""
        return self.first_mark + START

    def source(
        self, raw: Any, rng: np.random.Generator | None = None, options: Options = NO_OPTIONS
    ) -> Segment:
        """`raw` text as source tokens, at most `max_tokens`.

        What is longer is cut within `cuttable` (stretches of characters; default: anywhere), the longest first.
        """
        part = Part("text", _checked(raw), dict(options))
        found, starts, stops = self._encode_with_offsets(part.raw)
        ids = np.asarray(found, dtype=np.int64)
        cuttable = tuple(
            _in_tokens(stretch, np.asarray(starts), np.asarray(stops)) for stretch in cuttable_in(part)
        )
        arrays = {"ids": ids, "labels": np.full_like(ids, -1)}
        none = np.zeros(len(ids), bool)
        tokens = Segment("text", arrays, line(len(ids)), len(ids), none, cuttable=cuttable)
        (tokens,) = fit([tokens], self.max_tokens)
        if len(tokens) > self.max_tokens:  # words that may not be cut are longer than all that may be read
            tokens = select_tokens(tokens, np.arange(len(tokens)) < self.max_tokens)
        return tokens

    def target(
        self, raw: Any, rng: np.random.Generator | None = None, options: Options = NO_OPTIONS
    ) -> Segment:
        """START t1 … tn with the labels t1 … tn END: each token is asked for the next.

        A text of more than `max_tokens` is cut there and has no END, which would teach to stop amid a sentence.
        """
        max_tokens = int(options.get("max_tokens", self.max_tokens))
        tokens = self.written(self.encode_plain(_checked(raw)))
        if len(tokens) <= max_tokens + 1:
            return tokens
        return select_tokens(tokens, np.arange(len(tokens)) < max_tokens, (Cuttable(0, max_tokens),))

    def written(self, ids: list[int]) -> Segment:
        """A target text of these token ids, which END closes."""
        arrays = {
            "ids": np.asarray([self.start, *ids], dtype=np.int64),
            "labels": np.asarray([*ids, self.end], dtype=np.int64),
        }
        length = len(ids) + 1
        cuttable = (Cuttable(0, length),)  # its first tokens alone are the same text without an END
        return Segment(
            "text", arrays, line(length), length, np.ones(length, bool), "causal", cuttable=cuttable
        )

    def adapters(self, width: int) -> dict[str, Adapter]:
        return {"text": TextAdapter(self.vocabulary_size, width)}

    def examples(self) -> list[Any]:
        return ["seven red apples", "七个红苹果", "", "naïve 🙂 \u0000 <end>"]


def _checked(raw: Any) -> str:
    if not isinstance(raw, str):
        raise DataError(f"text was expected, not {type(raw).__name__}: map a text column to this field")
    try:
        raw.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON's \ud800 gives
        raise DataError(f"the text is not Unicode at character {error.start}: fix or remove it") from None
    return raw


def _in_tokens(stretch: Cuttable, starts: np.ndarray, stops: np.ndarray) -> Cuttable:
    """The tokens that lie wholly within a stretch of characters.  # N, N"""
    first = int(np.searchsorted(starts, stretch.start, "left"))
    last = int(np.searchsorted(stops, stretch.stop, "right"))
    return Cuttable(first, max(first, last), stretch.keep_end)


class TextAdapter(Adapter):
    """Embedding and, tied to it, the output layer."""

    def __init__(self, vocabulary_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        return self.embedding(arrays["ids"])  # N -> N D

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token.  # N D -> N V"""
        return F.linear(hidden, self.embedding.weight)

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(hidden).float(), arrays["labels"], reduction="none")

    def weighted_loss(
        self, hidden: Tensor, arrays: dict[str, Tensor], weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The logits of many words would be the largest tensor of a step: they are made and used up in chunks.
        return linear_cross_entropy(hidden, self.embedding.weight, arrays["labels"], weight)

    def name_vectors(self, name_ids: Tensor) -> Tensor:
        """Mean embedding of the words of a name; -1 pads.  # N K -> N D"""
        present = name_ids >= 0
        vectors = self.embedding(name_ids.clamp(min=0)) * present[..., None]  # N K D
        return vectors.sum(1) / present.sum(1, keepdim=True).clamp(min=1)
