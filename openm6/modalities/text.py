"""Text: byte-level BPE in and out, without unknown tokens; long texts are cut within inputs, not within prompts."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from openm6.core.config import Config
from openm6.core.errors import ConfigError, DataError
from openm6.modalities.chat_template import TemplatedChat
from openm6.modalities.interface import NO_OPTIONS, Adapter, Cuttable, Modality, Options, Part, Rng, Segment, line
from openm6.ops.int8 import Int8Weight
from openm6.ops.losses import linear_cross_entropy

MASK_CHARACTER = "\N{OBJECT REPLACEMENT CHARACTER}"  # becomes the mask token in a text with gaps
ROLES = ("system", "user", "assistant")  # of the turns of a chat
CACHED_TEXTS, CACHED_LENGTH = 4096, 200  # segments of texts of so many characters are kept


_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
# Letters of tokens of byte-level BPE, as GPT-2 writes them: a byte that is printed is itself, the others follow.
BYTES = {chr(byte): byte for byte in _PRINTED}
BYTES |= {chr(0x100 + n): byte for n, byte in enumerate(sorted({*range(0x100)} - {*_PRINTED}))}
# A space, and a byte of a letter that is no token, as SentencePiece writes them.
SPACE, BYTE = "\N{LOWER ONE EIGHTH BLOCK}", re.compile("<0x[0-9A-F]{2}>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learned from `texts`: every byte is a token, so no text is unknown.

    No token holds two Chinese characters: words of several would hide their characters, and verse counts those. Only
    the training needs to split there, as what it never merges is not merged afterwards, so llama.cpp has these rules.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    # Half of a surrogate pair, as in JSON's \ud800, becomes a question mark; its record is broken.
    tokenizer.train_from_iterator((text.encode("utf-8", "replace").decode() for text in texts), trainer)
    tokenizer.pre_tokenizer = byte_level
    return tokenizer


def read_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer in the JSON `text` of a tokenizer.json; ConfigError if it is not one.

    As in transformers, limits of length and padding in it, which a last call has left there, have no effect.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    # The library raises bare Exception.
    except Exception as error:
        raise ConfigError(f"{where} is not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class ImportedText(Config):
    """The text of an imported model: rows of its embedding, tokens around a text, and how messages become one.

    bos: precedes a text; eos: closes an answer; stops: more tokens that end one, such as that of a turn.
    chat_template: Jinja; names: texts of special tokens, such as `pad_token`; both as in tokenizer_config.json.
    context: the positions that it was trained on.
    """

    vocab_size: int = Field(gt=0)
    bos: int | None = None
    eos: int | None = None
    stops: tuple[int, ...] = ()
    tie_word_embeddings: bool = True
    context: int | None = None
    chat_template: str | None = None
    names: dict[str, str] = {}


class Text(Modality):
    """Text through a tokenizer, and special tokens: `start` opens a target text, `end` closes it, `mask` stands for
    masked words, one of `roles` opens the turn of a chat. Their ids lie above the tokenizer's, so no text of a user
    contains one; an imported model opens and closes texts with tokens of its own.

    `reads_gaps`: whether every text that is read may have gaps, not only those whose options have `gaps`.
    """

    reads_gaps = False
    name: ClassVar[str] = "text"

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = 2048, imported: ImportedText | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.imported = imported
        # Not the number of entries: another tokenizer may leave ids unused.
        self.first_special = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.start, self.end, self.mask = (self.first_special + index for index in range(3))
        self.roles = {role: self.mask + 1 + index for index, role in enumerate(ROLES)}
        # A multiple of 64 keeps the rows of the embedding aligned for the matrix units.
        self.vocab_size = -(-(self.mask + 1 + len(ROLES)) // 64) * 64
        if imported is not None:
            # Marks take rows of the embedding that the tokenizer does not use, or new ones.
            enough = imported.vocab_size > self.mask + len(ROLES)
            self.vocab_size = imported.vocab_size if enough else self.vocab_size
            self.start = self.start if imported.bos is None else imported.bos
            self.end = self.end if imported.eos is None else imported.eos
        self.ends = frozenset((self.end, *(() if imported is None else imported.stops)))
        # Prompts, labels and names of columns come back in every epoch; nobody changes the arrays of a segment.
        self._cached_source = functools.lru_cache(CACHED_TEXTS)(self._source)
        self._cached_target = functools.lru_cache(CACHED_TEXTS)(self._target)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; each MASK_CHARACTER becomes the mask token if the model reads gaps."""
        return self._encode_with_offsets(text, self.reads_gaps)[0]

    def _encode_with_offsets(self, text: str, gaps: bool) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for index, words in enumerate(text.split(MASK_CHARACTER) if gaps else [text]):
            if index:
                ids.append(self.mask)
                offsets.append((position, position + 1))
                position += 1
            encoding = self.tokenizer.encode(words, add_special_tokens=False)
            ids.extend(encoding.ids)
            offsets.extend((position + start, position + stop) for start, stop in encoding.offsets)
            position += len(words)
        return ids, offsets

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens and unused ids."""
        return self.tokenizer.decode([token for token in ids if token < self.first_special and token not in self.ends])

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 that a token stands for, which may be a part of a character, whose text alone is U+FFFD."""
        text, letters = self.decode([token]), self.tokenizer.id_to_token(token) or ""
        if self.tokenizer.token_to_id(SPACE) is not None:
            if BYTE.fullmatch(letters):
                return bytes.fromhex(letters[3:5])
            return letters.replace(SPACE, " ").encode() if text or not letters.strip(SPACE) else b""  # a special token
        is_bytes = "\ufffd" in text and all(letter in BYTES for letter in letters)
        return bytes(BYTES[letter] for letter in letters) if is_bytes else text.encode()

    def source(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """`raw` text as at most `max_tokens` source tokens, cut within `cuttable` spans of characters."""
        segment_of = self._cached_source if len(_checked(raw)) <= CACHED_LENGTH else self._source
        gaps = self.reads_gaps or bool(options.get("gaps"))
        return segment_of(raw, cuttable_in(raw, options), options.get("role"), gaps)

    def _source(self, text: str, spans: tuple[Cuttable, ...], role: str | None, gaps: bool) -> Segment:
        ids, offsets = self._encode_with_offsets(text, gaps)
        if role is not None:
            ids, offsets = [self.roles[role], *ids], [(-1, -1), *offsets]  # outside every span of the text
        starts, stops = np.asarray(offsets).reshape(-1, 2).T
        cuttable = []
        for span in spans:  # the tokens that lie wholly within each span
            first = int(np.searchsorted(starts, span.start, "left"))
            last = int(np.searchsorted(stops, span.stop, "right"))
            cuttable.append(Cuttable(first, max(first, last), span.keep_end))
        (segment,) = fit([_source_of(ids, tuple(cuttable))], self.max_tokens)
        if len(segment) > self.max_tokens:  # the words that may not be cut may be longer than that
            segment = select_tokens(segment, np.arange(len(segment)) < self.max_tokens)
        return segment

    def target(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """`start` t1 … tn with the labels t1 … tn `end`: each token predicts the next.

        A text of more than `max_tokens` is cut there and has no end token, which would train to stop within a sentence.
        """
        segment_of = self._cached_target if len(_checked(raw)) <= CACHED_LENGTH else self._target
        return segment_of(raw, int(options.get("max_tokens", self.max_tokens)))

    def _target(self, text: str, max_tokens: int) -> Segment:
        segment = self.target_of(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if len(segment) <= max_tokens + 1:
            return segment
        return select_tokens(segment, np.arange(len(segment)) < max_tokens, (Cuttable(0, max_tokens),))

    def candidate(self, raw: str) -> Segment:
        """A text to be ranked by its likelihood: a target, but after a decoder's raw text without the end.

        An imported decoder ends turns of a chat, and would find the end of any candidate about equally unlikely.
        """
        found = self.target(raw)
        if self.imported is None or found.truncated or len(found) < 2:
            return found
        return replace(select_tokens(found, np.arange(len(found)) < len(found) - 1), truncated=False)

    def target_of(self, ids: list[int]) -> Segment:
        """A target text of these token ids, which the end token closes."""
        arrays = {
            "ids": np.asarray([self.start, *ids], dtype=np.int64),
            "labels": np.asarray([*ids, self.end], dtype=np.int64),
        }
        length = len(ids) + 1
        learn = np.ones(length, bool)
        cuttable = (Cuttable(0, length),)  # its first tokens alone are the same text without the end token
        return Segment("text", arrays, line(length), length, learn, "causal", cuttable=cuttable)

    def chat(self, parts: Sequence[Part]) -> tuple[Sequence[Part], tuple[int, ...]]:
        """The parts of a chat as they are read, and the tokens before its answer, by the imported chat template.

        A template that puts none there is answered from the last token of the chat.
        """
        if self.imported is None or (template := self.imported.chat_template) is None:
            return parts, (self.roles["assistant"],)
        ids = {"bos_token": self.start, "eos_token": self.end}
        tokens = {name: self.tokenizer.id_to_token(token) or "" for name, token in ids.items()} | self.imported.names
        added = self.tokenizer.get_added_tokens_decoder().values()
        chat = TemplatedChat(parts, template, tokens, [token.content for token in added if token.special])
        shown, opening = chat.parts(), chat.opening()
        # SentencePiece writes a text that stands alone in another way than one that goes on.
        last = shown[-1].raw if shown and shown[-1].modality == "text" and not shown[-1].options.get("learned") else ""
        before, whole = self.encode(last), self.encode(last + opening)
        goes_on = whole[: len(before)] == before
        return shown, tuple(whole[len(before) :] if goes_on else self.encode(opening))

    def with_bos(self, segments: list[Segment]) -> list[Segment]:
        """The segments of a prompt with the token before them that the imported tokenizer puts before a text."""
        bos = None if self.imported is None else self.imported.bos
        first = segments[0] if segments and segments[0].kind == "text" else None
        if bos is None or (first is not None and len(first) and first.arrays["ids"][0] == bos):
            return segments
        return [causal_source([bos]), *segments] if first is None else [after_tokens([bos], first), *segments[1:]]

    def adapters(self, hidden_size: int) -> dict[str, Adapter]:
        tied = self.imported is None or self.imported.tie_word_embeddings
        return {"text": TextAdapter(self.vocab_size, hidden_size, tied)}


def causal_source(ids: list[int]) -> Segment:
    """Tokens of a causal prompt that are not cut."""
    return replace(_source_of(ids, ()), placement="causal")


def after_tokens(before: Sequence[int], segment: Segment) -> Segment:
    """A text after more tokens, of which nothing is learned, and which are not cut."""
    first, count = _source_of(list(before), ()), len(before) + len(segment)
    arrays = {name: np.concatenate([first.arrays[name], array]) for name, array in segment.arrays.items()}
    learn = np.concatenate([first.learn, segment.learn])
    cuttable = tuple(one._replace(start=one.start + len(first), stop=one.stop + len(first)) for one in segment.cuttable)
    return replace(segment, arrays=arrays, grid=line(count), span=count, learn=learn, cuttable=cuttable)


def _source_of(ids: list[int], cuttable: tuple[Cuttable, ...]) -> Segment:
    arrays = {"ids": np.asarray(ids, dtype=np.int64), "labels": np.full(len(ids), -1, np.int64)}
    return Segment("text", arrays, line(len(ids)), len(ids), np.zeros(len(ids), bool), cuttable=cuttable)


def _checked(raw: Any) -> str:
    if not isinstance(raw, str):
        raise DataError(f"text was expected, not {type(raw).__name__}: map a text column to this field")
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        # Half of a surrogate pair, as in JSON's \ud800.
        raise DataError(f"the text is not Unicode at character {error.start}: fix or remove it") from None
    return raw


def join_texts(first: Part, second: Part) -> Part:
    """Two texts as one, which may be cut where each of them may be."""
    shift = len(first.raw)
    spans = cuttable_in(second.raw, second.options)
    moved = [Cuttable(span.start + shift, span.stop + shift, span.keep_end) for span in spans]
    return Part("text", first.raw + second.raw, {"cuttable": (*cuttable_in(first.raw, first.options), *moved)})


def cuttable_in(text: str, options: Options) -> tuple[Cuttable, ...]:
    """Where a text may be cut, in characters: anywhere unless its options set it."""
    spans = options.get("cuttable")
    return (Cuttable(0, len(text)),) if spans is None else tuple(spans)


def fit(segments: Sequence[Segment], limit: int, shortest: int = 0) -> list[Segment]:
    """Segments of at most `limit` tokens together, texts cut to one length; as they are if that is below `shortest`."""
    lengths = [span.stop - span.start for segment in segments for span in segment.cuttable]
    excess = sum(map(len, segments)) - limit
    left = sum(lengths) - excess
    if excess <= 0 or left < 0 or not lengths:
        return list(segments)
    for index, length in enumerate(sorted(lengths)):  # the largest c for which Σ min(length, c) is at most `left`
        longest = left // (len(lengths) - index)
        if length > longest:
            break
        left -= length
    return list(segments) if longest < shortest else [_cut(segment, longest) for segment in segments]


def _cut(segment: Segment, longest: int) -> Segment:
    """The segment with at most `longest` tokens of each span that may be cut."""
    kept = np.ones(len(segment), bool)
    left: list[Cuttable] = []
    lost = 0
    for span in segment.cuttable:
        over = max(0, span.stop - span.start - longest)
        gone = slice(span.start, span.start + over) if span.keep_end else slice(span.stop - over, span.stop)
        kept[gone] = False
        left.append(Cuttable(span.start - lost, span.stop - lost - over, span.keep_end))
        lost += over
    return select_tokens(segment, kept, tuple(left)) if lost else segment


def select_tokens(segment: Segment, kept: np.ndarray, cuttable: tuple[Cuttable, ...] = ()) -> Segment:
    """A text of those of its tokens that are kept, marked as truncated.  # N bool"""
    count = int(kept.sum())
    return replace(
        segment,
        arrays={name: array[kept] for name, array in segment.arrays.items()},
        grid=line(count),
        # What is private does not move what follows.
        span=count if segment.span else 0,
        learn=segment.learn[kept],
        truncated=True,
        cuttable=cuttable,
    )


class TextAdapter(Adapter):
    """Embedding and output layer, which is the embedding itself unless they are not tied."""

    def __init__(self, vocab_size: int, hidden_size: int, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = None if tied else nn.Parameter(torch.empty(vocab_size, hidden_size).normal_(std=0.02))
        # A copy for inference in int8; tokens are embedded by the weights themselves.
        self.int8_head: Int8Weight | None = None

    @property
    def output_weight(self) -> Tensor:
        """The weight of the output layer.  # V D"""
        return self.embedding.weight if self.head is None else self.head

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        return self.embedding(arrays["ids"])  # N -> N D

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token.  # N D -> N V"""
        return F.linear(hidden, self.output_weight) if self.int8_head is None else self.int8_head.linear(hidden)

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(hidden).float(), arrays["labels"], reduction="none")

    def weighted_loss(self, hidden: Tensor, arrays: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        # The logits of many tokens would be the largest tensor of a step: they are computed in chunks.
        return linear_cross_entropy(hidden, self.output_weight, arrays["labels"], weight)

    def name_vectors(self, name_ids: Tensor) -> Tensor:
        """Mean embedding of the words of a name; -1 pads.  # N K -> N D"""
        present = name_ids >= 0
        vectors = self.embedding(name_ids.clamp(min=0)) * present[..., None]  # N K D
        return vectors.sum(1) / present.sum(1, keepdim=True).clamp(min=1)
