"""Chats: turns of a conversation as a prompt, the same in training and when a server answers.

A turn is a token of its role and what was said. Training learns the answers of all turns in one sequence: an answer is
a hidden target, then a turn like any other, which what follows attends to.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial

from openm6.core.errors import MissingFieldError
from openm6.modalities.interface import Part
from openm6.tasks.slots import MAX_TOKENS, Built, Context, Derived, Record

Turn = tuple[str, Sequence[Part]]
"""One of ROLES, and what was said, in order."""


def join_neighbours(parts: Iterable[Part], between: str = "") -> list[Part]:
    """Join neighbouring texts; a text after another modality begins with a blank, as in prompts."""
    found: list[Part] = []
    for part in parts:
        if part.modality == "text" and found and found[-1].modality == "text":
            found[-1] = Part("text", found[-1].raw + between + part.raw)
        elif part.modality == "text" and found and not part.raw[:1].isspace():
            found.append(Part("text", " " + part.raw))
        else:
            found.append(part)
    return found


def said(parts: Iterable[Part]) -> list[Part]:
    """What was said in a turn: texts without white space around them, none of them empty."""
    return join_neighbours(part for part in _stripped(join_neighbours(parts)) if part.modality != "text" or part.raw)


def _stripped(parts: Iterable[Part]) -> list[Part]:
    return [replace(part, raw=part.raw.strip()) if part.modality == "text" else part for part in parts]


def chat_parts(turns: Iterable[Turn]) -> list[Part]:
    """The prompt of a chat: each turn with the token of its role; what comes next is the answer."""
    found: list[Part] = []
    for role, parts in turns:
        first, *rest = [*said(parts), Part("text", "")]
        if first.modality != "text":
            first, rest = Part("text", ""), [first, *rest]
        found += [Part("text", first.raw, {"role": role}), *(part for part in rest if part.raw != "")]
    return found


def turns_of(record: Record) -> list[Turn]:
    return [
        (message["role"], said(Part(item["type"], item[item["type"]]) for item in message["content"]))
        for message in record.get("messages") or ()
    ]


def _left_out(record: Record) -> set[int]:
    """The turns whose answers are not to be learned."""
    messages = record.get("messages") or ()
    return {index for index, message in enumerate(messages) if not message.get("learned", True)}


def _last_answer(turns: Sequence[Turn], modality: str, left_out: Collection[int]) -> int | None:
    """The last turn of the assistant that follows another one, holds a modality and is to be learned."""
    fitting = (
        index for index, (role, parts) in enumerate(turns)
        if index and index not in left_out and role == "assistant" and any(part.modality == modality for part in parts)
    )  # fmt: skip
    return max(fitting, default=None)


def build_chat(record: Record, context: Context, modality: str) -> Built:
    """The last answer of a modality, and the turns before it; in training their answers are learned, too.

    So are other parts of the last answer. Each is an answer to the turns before, not to the other parts.
    """
    turns, left_out = turns_of(record), _left_out(record)
    last = _last_answer(turns, modality, left_out)
    if last is None:
        raise MissingFieldError(f"record {record.get('id')!r} holds no answer in {modality}: choose another chat task")
    shown: list[Part] = []
    for index, turn in enumerate(turns[:last]):
        if turn[0] == "assistant" and index and index not in left_out and context.train:
            shown += map(_learned, _stripped(turn[1]))
        shown += chat_parts([turn])
    answers = _stripped(turns[last][1])  # without the blank that separates a text from an image
    target = next(part for part in answers if part.modality == modality)
    if context.train:
        shown += [_learned(part) for part in answers if part is not target]
    elif modality == "text":
        target = replace(target, options={"max_tokens": MAX_TOKENS})
    return Built({}, target, turns=shown)


def _learned(part: Part) -> Part:
    return replace(part, options={**part.options, "learned": True})


def _answer(modality: str) -> Derived:
    return Derived(
        modality,
        partial(build_chat, modality=modality),
        lambda record, _: _last_answer(turns_of(record), modality, _left_out(record)) is not None,
    )


SLOTS = {f"answer_in_{modality}": _answer(modality) for modality in ("text", "image", "audio", "numbers")}
