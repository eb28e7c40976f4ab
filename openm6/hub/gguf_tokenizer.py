"""The tokenizer in a GGUF file's metadata as a tokenizer.json, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from openm6.core.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a blank in the tokens of SentencePiece
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of llama.cpp for the rules by which byte-level BPE divides a text into words.
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
ALIASES = {"olmo": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def _pre_tokenizer(name: str) -> PreTokenizer:
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    if name == "gpt-2":
        return by_bytes
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    pattern = _LLAMA3 if name == "llama-bpe" else _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), by_bytes])


def read_gguf_tokenizer(fields: Mapping[str, Any]) -> tuple[str, int | None, int | None, str | None]:
    """The text of a tokenizer.json, what opens and what closes a text, and the chat template, from `tokenizer.…`.

    Raises:
        ConfigError: a tokenizer of another kind, or a field missing.
    """
    model, pre = fields.get("ggml.model"), fields.get("ggml.pre", "gpt-2")
    pre = ALIASES.get(pre, pre)
    if model not in ("gpt2", "llama") or (model == "gpt2" and pre not in PRE_TOKENIZERS):
        raise ConfigError(
            f"the tokenizer {model!r} with pre-tokenizer {pre!r} in the GGUF cannot be read: import the safetensors of "
            "this model, with their tokenizer.json"
        )
    try:
        return _read(fields, model, pre)
    except KeyError as missing:
        raise ConfigError(f"the GGUF lacks tokenizer.{missing.args[0]}: download it again") from None
    # The library raises bare Exception, of merges without their tokens.
    except Exception as error:
        raise ConfigError(f"the tokenizer in the GGUF is broken ({error}): download it again") from None


def _read(fields: Mapping[str, Any], model: str, pre: str) -> tuple[str, int | None, int | None, str | None]:
    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    tokenizer = _byte_level(fields, pre) if model == "gpt2" else _scored_bpe(fields)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    bos, eos = (fields.get(f"ggml.{name}_token_id") for name in ("bos", "eos"))
    if bos is not None and fields.get("ggml.add_bos_token", model == "llama" or pre == "llama-bpe"):
        pair = [(tokens[bos], bos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=pair)
    else:
        bos = None
    return tokenizer.to_str(), bos, eos, fields.get("chat_template")


def _byte_level(fields: Mapping[str, Any], pre: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(fields["ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = _pre_tokenizer(pre), decoders.ByteLevel()
    return tokenizer


def _scored_bpe(fields: Mapping[str, Any]) -> Tokenizer:
    """BPE whose merges follow from the scores: of two tokens that stand side by side, the best one they make."""
    tokens, scores = fields["ggml.tokens"], fields["ggml.scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        halves = ((token[:index], token[index:]) for index in range(1, len(token)))
        found = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        found.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(-score, len(left), len(right), left, right) for left, right in found]
    ranked.sort(key=lambda merge: (merge[0], -merge[1], -merge[2]))
    merges = [(left, right) for *_, left, right in ranked]
    unknown = tokens[fields.get("ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend(SPACE)] if fields.get("ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if first else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def gguf_tokenizer(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer of `rows` tokens; ConfigError if llama.cpp does not know its rules."""
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    pre = next((name for name in PRE_TOKENIZERS if _rules(_pre_tokenizer(name)) == _rules(content)), None)
    if model["type"] != "BPE" or pre is None:
        raise ConfigError("llama.cpp has no name for the rules of this tokenizer: export with --format hf")
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": [names.get(index, f"[unused{index}]") for index in range(rows)],
        "ggml.token_type": [added.get(index, NORMAL if index in names else 5) for index in range(rows)],
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }


def _rules(source: Any) -> str:
    """The pre-tokenizer as plain data, without what has no effect on tokens."""
    if isinstance(source, PreTokenizer):
        blank = Tokenizer(models.BPE())
        blank.pre_tokenizer = source
        source = json.loads(blank.to_str())
    found = source["pre_tokenizer"]
    return json.dumps(found, sort_keys=True).replace('"trim_offsets": false', '"trim_offsets": true')
