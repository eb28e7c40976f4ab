"""The list of modalities, their settings, and raw parts turned into segments of a sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from openm6.codecs.external import weights_sha256
from openm6.codecs.registry import load_codec, load_encoder
from openm6.core.config import Config
from openm6.core.errors import ConfigError, DataError, PromptTooLongError, nearest
from openm6.modalities.audio import Audio, AudioConfig
from openm6.modalities.image import Image, ImageConfig
from openm6.modalities.interface import Modality, Part, Segment
from openm6.modalities.numbers import Numbers, Scales
from openm6.modalities.text import ImportedText, Text, after_tokens, causal_source, select_tokens

MODALITIES: dict[str, type[Modality]] = {kind.name: kind for kind in (Text, Image, Audio, Numbers)}
PromptAttention = Literal["bidirectional", "block", "causal"]


class Modalities(dict[str, Modality]):
    """The modalities of one model by name, and the attention within its prompts.

    `bidirectional`: all tokens of a prompt attend to one another. `block`: those of a part (text, image, audio,
    numbers) attend to it and the parts before it, so its keys do not depend on what follows, and can be cached.
    `causal`: as `block`, but each token of a text attends to those before it only, as in an imported decoder.
    """

    prompt_attention: PromptAttention = "bidirectional"
    external: Mapping[str, str] = MappingProxyType({})  # sha256 of the weights of codecs and encoders, by setting

    def __missing__(self, name: str) -> Modality:
        raise ConfigError(f"no modality is called {name!r}; {nearest(name, sorted(self))}")


class TextConfig(Config):
    """`vocab_size` tokens (default: the preset's) are learned, unless a file is named or a model is `imported`."""

    vocab_size: int | None = Field(default=None, ge=320, le=1_000_000)
    tokenizer: str | None = None
    max_tokens: int = Field(default=2048, ge=1)
    imported: ImportedText | None = None


class NumbersConfig(Config):
    """Whether columns have simple predictors: linear models, trees and networks (auto), linear models, or none."""

    predictors: Literal["auto", "ridge", "none"] = "auto"


class ModalitiesConfig(Config):
    """Settings of the four modalities: the section `modalities` of a recipe."""

    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    audio: AudioConfig = AudioConfig()
    numbers: NumbersConfig = NumbersConfig()
    prompt_attention: PromptAttention = Field(
        default="bidirectional",
        description="block: each part of a prompt attends to itself and those before it; causal: and texts are causal",
    )


def load_networks(config: ModalitiesConfig) -> dict[str, Any]:
    """Codecs and encoders by setting; ConfigError: one of another modality, or a side that does not fit."""
    found: dict[str, Any] = {}
    for name, section in (("image", config.image), ("audio", config.audio)):
        codec = found[f"{name}.codec"] = load_codec(section.codec, getattr(section, "codebooks", None))
        if codec.kind != name:
            hint = f"name one, as {type(section)().codec}"
            raise ConfigError(f"modalities.{name}.codec={section.codec!r} is no {name} codec: {hint}")
        if section.encoder is not None:
            found[f"{name}.encoder"] = load_encoder(section.encoder, name)
    side, step = config.image.side, found["image.codec"].step
    if side % step:
        raise ConfigError(f"modalities.image.side={side} must be a multiple of the codec's stride, {step}")
    return found


def build_modalities(config: ModalitiesConfig, tokenizer: Tokenizer, scales: Scales) -> Modalities:
    """The four modalities of one model; what else `Numbers` has is set later. Errors as `load_networks`."""
    networks = load_networks(config)
    text = Text(tokenizer, config.text.max_tokens, config.text.imported)
    modalities = Modalities(
        text=text,
        image=Image(networks["image.codec"], config.image, networks.get("image.encoder")),
        audio=Audio(networks["audio.codec"], config.audio, networks.get("audio.encoder")),
        numbers=Numbers(text, scales, {}),
    )
    modalities.prompt_attention = config.prompt_attention
    modalities.external = {name: weights_sha256(one) for name, one in networks.items()}
    return modalities


def source_segments(
    parts: Sequence[Part], modalities: Modalities, rng: np.random.Generator | None = None
) -> list[Segment]:
    """Raw parts as source tokens; a generator asks for augmentation.

    A part with a `role` begins a turn, whose tokens attend to one another and to earlier turns, also in a model of
    bidirectional prompts. One that is `learned` is a target beside the sources, left out without a generator.
    ConfigError: an unknown modality; DataError: a part is broken or out of bounds.
    """
    text, causal = modalities["text"], modalities.prompt_attention == "causal"
    assert isinstance(text, Text)
    opening: tuple[int, ...] = ()
    # A decoder answers from the last token, which is that of the role in a chat.
    if causal and any("role" in part.options for part in parts):
        parts, opening = text.chat(parts)
    segments: list[Segment] = []
    held: int | None = None  # the last token of a turn that answers follow, if their template opens them with none
    for part in parts:
        if part.options.get("learned"):
            if rng is not None:
                if causal and not opening and held is None:
                    segments, held = split_opening(segments)
                target = target_segment(part, modalities, rng)
                segments.append(_beside(target, opening or (() if held is None else (held,))))
            continue
        segment = modalities[part.modality].source(part.raw, rng, part.options)
        if modalities.prompt_attention != "bidirectional" or "role" in part.options:
            segment = replace(segment, placement="causal" if causal and segment.kind == "text" else "part")
        if held is not None and segment.kind == "text":
            segment, held = after_tokens([held], segment), None
        elif held is not None:
            segments, held = [*segments, causal_source([held])], None
        segments.append(segment)
    if held is not None:
        segments.append(causal_source([held]))
    if causal:
        segments = text.with_bos(segments)
    if opening and segments:  # a template may leave nothing of a chat
        segments[-1] = replace(segments[-1], opening=opening)
    return segments


def prompt_segments(parts: Sequence[Part], modalities: Modalities) -> list[Segment]:
    """`source_segments` of a prompt to answer; PromptTooLongError if it is longer than an imported model reads."""
    segments, text = source_segments(parts, modalities), modalities["text"]
    assert isinstance(text, Text)
    if text.imported is not None and any(one.truncated for one in segments if one.kind == "text"):
        raise PromptTooLongError(
            f"the prompt has more than the {text.max_tokens} tokens that this model reads: shorten it"
        )
    return segments


def _beside(target: Segment, opening: tuple[int, ...]) -> Segment:
    """A target that is hidden from what follows, which begins at the same position."""
    if opening and target.kind == "text":
        cuttable = () if opening[1:] else target.cuttable
        target = replace(after_tokens(opening[:-1], opened(target, opening[-1])), cuttable=cuttable)
    return replace(target, span=0, placement="aside" if target.placement == "causal" else target.placement)


def split_opening(prompt: list[Segment]) -> tuple[list[Segment], int | None]:
    """A prompt without the token that opens the text after it: the last one of a causal text, else None.

    A decoder continues a text from its last token; other prompts are answered by a text with a start token of its own.
    A chat is continued from the last of the tokens before its answer.
    """
    if prompt and prompt[-1].opening:
        *before, last_token = prompt[-1].opening
        return [*prompt, *([causal_source(before)] if before else [])], last_token
    if not prompt or prompt[-1].placement != "causal" or not len(prompt[-1]):
        return prompt, None
    last, length = prompt[-1], len(prompt[-1]) - 1
    cuttable = tuple(one._replace(start=min(one.start, length), stop=min(one.stop, length)) for one in last.cuttable)
    rest = select_tokens(last, np.arange(len(last)) < length, cuttable)
    kept = [replace(rest, truncated=last.truncated)] if length else []
    return [*prompt[:-1], *kept], int(last.arrays["ids"][-1])


def opened(target: Segment, token: int | None) -> Segment:
    """A target text that is opened by a token of its prompt instead of its own, see `split_opening`."""
    if token is None or target.kind != "text":
        return target
    ids = target.arrays["ids"].copy()
    ids[0] = token
    return replace(target, arrays={**target.arrays, "ids": ids})


def target_segment(part: Part, modalities: Modalities, rng: np.random.Generator | None = None) -> Segment:
    """A raw part as target tokens; a generator draws the training mask.

    Raises:
        ConfigError: no modality has the name of the part's.
        DataError: the part is broken, or there is nothing in it to learn.
    """
    segment = modalities[part.modality].target(part.raw, rng, part.options)
    if not segment.learn.any():
        raise DataError(f"nothing of this {part.modality} is observed, so there is nothing to learn from it")
    return segment
