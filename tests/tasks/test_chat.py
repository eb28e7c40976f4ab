"""Chats: an answer in the middle of a training sequence is learned exactly as the server is asked for it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer

from openm6.core.errors import ConfigError, MissingFieldError
from openm6.data.prepare import example_sequence
from openm6.evaluate.likelihood import sequence_nll
from openm6.inference.load import LoadedModel
from openm6.inference.question import Question, _as_single_questions, assess, chat_prompt, prompt_parts
from openm6.modalities.batch import build_sequence, shortened
from openm6.modalities.interface import NO_OPTIONS, Modality, Options, Part, Segment
from openm6.modalities.registry import (
    MODALITIES,
    Modalities,
    PromptAttention,
    opened,
    source_segments,
    split_opening,
    target_segment,
)
from openm6.modalities.text import ImportedText, Text
from openm6.models.description import TrainedTask
from openm6.serve.config import Limits
from openm6.serve.content import Message, parts_of_messages
from openm6.tasks.chat import chat_parts, turns_of
from openm6.tasks.registry import TASKS
from tests.data.sample_images import png
from tests.small_model import loaded


def sound() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(4000) / 9).astype(np.float32), 16000, format="FLAC")
    return buffer.getvalue()


IMAGE, AUDIO = png(), sound()
RECORD: dict[str, Any] = {
    "id": "talk",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "\nWhat is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " a cup "}]},
        {"role": "user", "content": [{"type": "text", "text": "Draw it, say it, weigh it."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Here:"},
                {"type": "image", "image": IMAGE},
                {"type": "numbers", "numbers": {"mass": 9.0}},
            ],
        },
        {"role": "user", "content": [{"type": "audio", "audio": AUDIO}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
        {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
    ],
}


def model(prompt_attention: PromptAttention = "bidirectional", **changes: Any) -> LoadedModel:
    found = loaded(trained_tasks=(("chat", "talk"),), prompt_attention=prompt_attention)
    found.description.trained_tasks[0] = TrainedTask(task="chat", source="talk", **changes)
    return found


def messages_before(index: int) -> list[Message]:
    """The messages of the record before one of them, as a client of the server sends them."""
    found = []
    for message in RECORD["messages"][:index]:
        content: list[dict[str, Any]] = []
        for item in message["content"]:
            raw = item[item["type"]]
            data = base64.b64encode(raw).decode() if isinstance(raw, bytes) else ""
            content.append(
                {
                    "text": {"type": "text", "text": raw},
                    "image": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                    "audio": {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}},
                    "numbers": {"type": "numbers", "numbers": raw},
                }[item["type"]]
            )
        found.append(Message(role=message["role"], content=content))  # type: ignore[arg-type]
    return found


def asked_alone(index: int, kind: str, asked: LoadedModel) -> float:
    """The nats of one part of an answer, after the prompt that the server makes of the messages before it."""
    prompt = source_segments(parts_of_messages(messages_before(index), Limits(), asked), asked.modalities)
    (part,) = (part for part in turns_of(RECORD)[index][1] if part.modality == kind)
    target = target_segment(part, asked.modalities)
    if kind == "text":
        prompt, opening = split_opening(prompt)
        target = opened(target, opening)
    return float(sequence_nll(asked.omni, [build_sequence([*prompt, target])])[0])


def _unaugmented(method: Callable[..., Segment]) -> Callable[..., Segment]:
    def plain(modality: Modality, raw: Any, rng: Any = None, options: Options = NO_OPTIONS) -> Segment:
        return method(modality, raw, None, options)

    return plain


ANSWERS = [(2, "text"), (4, "text"), (4, "image"), (4, "numbers"), (6, "text")]


@pytest.mark.parametrize("name", ["bidirectional", "block", "causal", "template"])
def test_each_answer_is_learned_as_the_server_is_asked_for_it(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = imported() if name == "template" else model(name)
    # Nothing is augmented, and targets are masked as a whole, as they are generated.
    for kind in MODALITIES.values():
        for method in ("source", "target"):
            monkeypatch.setattr(kind, method, _unaugmented(getattr(kind, method)))
    example = TASKS["chat"].example(RECORD, np.random.default_rng(0), train=True)
    learned = [part for part in example.source if part.options.get("learned")]
    assert [part.modality for part in learned] == ["text", "text", "image", "numbers"] and example.answer == "seven"
    sequence = example_sequence(example, asked.modalities, np.random.default_rng(0))
    segments = [segment for segment in sequence.segments if segment.learn.any()]
    assert len(segments) == len(ANSWERS) and sequence.segments[-1] is segments[-1]
    alone = sum(asked_alone(index, kind, asked) for index, kind in ANSWERS)
    assert float(sequence_nll(asked.omni, [sequence])[0]) == pytest.approx(alone, abs=2e-3)


def test_the_prompt_of_the_server_is_the_beginning_of_the_training_sequence() -> None:
    asked = model()
    example = TASKS["chat"].example(RECORD, np.random.default_rng(0), train=True)
    shown = [part for part in example.source if not part.options.get("learned")]
    assert shown == list(parts_of_messages(messages_before(6), Limits(), asked))
    assert shown == chat_prompt(turns_of(RECORD)[:6], asked)


def test_what_is_not_trained_is_the_same_without_the_hidden_answers() -> None:
    example = TASKS["chat"].example(RECORD, np.random.default_rng(0))
    assert example.source == chat_parts(turns_of(RECORD)[:6]) and example.target.raw == "seven"
    assert not any(part.options.get("learned") for part in example.source)


@pytest.mark.parametrize(
    ("task", "before", "answer"),
    [("chat", 6, "seven"), ("chat_to_image", 4, IMAGE), ("chat_to_numbers", 4, {"mass": 9.0})],
)
def test_each_task_answers_the_last_turn_of_its_modality(task: str, before: int, answer: Any) -> None:
    example = TASKS[task].example(RECORD, np.random.default_rng(0))
    assert example.source == chat_parts(turns_of(RECORD)[:before]) and example.answer == answer
    assert example.target.modality == TASKS[task].output_modality
    shown = TASKS[task].example(RECORD, np.random.default_rng(0), train=True).source
    assert sum(bool(part.options.get("learned")) for part in shown) == (4 if task == "chat" else 3)


def test_answers_that_are_there_for_their_context_are_not_learned() -> None:
    messages = [
        {"role": role, "content": [{"type": "text", "text": words}]}
        for role, words in (("user", "one?"), ("assistant", "bad"), ("user", "two?"), ("assistant", "good"))
    ]
    messages[1]["learned"] = False
    example = TASKS["chat"].example({"id": "x", "messages": messages}, np.random.default_rng(0), train=True)
    assert example.answer == "good" and not any(part.options.get("learned") for part in example.source)
    messages[3]["learned"] = False
    assert not TASKS["chat"].languages({"id": "x", "messages": messages})


def test_a_chat_without_an_answer_of_the_modality_is_skipped() -> None:
    assert not TASKS["chat_to_audio"].languages(RECORD)
    with pytest.raises(MissingFieldError, match="task chat_to_audio"):
        TASKS["chat_to_audio"].example(RECORD, np.random.default_rng(0))


def test_a_role_is_one_token_that_no_text_contains() -> None:
    asked = model()
    text = asked.text
    assert len(set(text.roles.values())) == 3 and max(text.roles.values()) < text.vocab_size
    (segment,) = source_segments(chat_parts([("user", [Part("text", "hello")])]), asked.modalities)
    assert segment.arrays["ids"].tolist() == [text.roles["user"], *text.encode("hello")]
    first, second = source_segments(chat_parts([("user", [Part("image", IMAGE)])]), asked.modalities)
    assert first.arrays["ids"].tolist() == [text.roles["user"]] and second.kind == "image_in"
    assert (first.placement, second.placement) == ("part", "source")


def test_a_long_chat_is_cut_in_its_words_and_keeps_its_roles() -> None:
    long = {**RECORD, "messages": [{**one, "content": [{"type": "text", "text": "seven red apples " * 9}]}
                                   for one in RECORD["messages"]]}  # fmt: skip
    asked = model()
    example = TASKS["chat"].example(long, np.random.default_rng(0), train=True)
    sequence = shortened(example_sequence(example, asked.modalities, np.random.default_rng(0)), 300)
    assert len(sequence) <= 300 and sequence.truncated
    ids = np.concatenate([segment.arrays["ids"] for segment in sequence.segments if not segment.learn.any()])
    assert np.isin(ids, list(asked.text.roles.values())).sum() == 6
    assert all(segment.span == 0 for segment in sequence.segments[:-1] if segment.learn.any())


def test_a_question_to_a_model_of_chats_is_a_turn_of_the_user() -> None:
    parts = prompt_parts(Question(output="text", text="What is it?", image=IMAGE), model())
    assert [part.options.get("role") for part in parts] == ["user", None, None]
    assert [part.raw for part in parts[1:]] == [IMAGE, " What is it?"]
    trained = loaded(trained_tasks=(("chat", "talk"), ("image_captioning", "emoji")))
    words = prompt_parts(Question(output="text", image=IMAGE), trained)
    assert not any("role" in part.options for part in words) and words[-1].raw.strip()


def test_what_the_chats_held_is_trained() -> None:
    description = model(modalities=["image"], words=(1, 9)).description
    words, image = Part("text", "What is it?", {"role": "user"}), Part("image", IMAGE)
    assert (
        assess([words], "text", description, 0.9).trained and assess([words, image], "text", description, 0.9).trained
    )
    assert not assess([words, Part("audio", AUDIO)], "text", description, 0.9).trained
    assert not assess([words], "image", description).trained
    json.dumps(description.model_dump(mode="json"))


TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>system\nHelp.</s>\n{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def imported(template: str = TEMPLATE, trained: bool = True) -> LoadedModel:
    """The model as if it were an imported decoder with a chat template."""
    found = model("causal")
    tokenizer = Tokenizer.from_str(found.text.tokenizer.to_str())
    tokenizer.add_special_tokens(["<e>"])
    text = Text(tokenizer, imported=ImportedText(vocab_size=384, chat_template=template))
    description = found.description if trained else found.description.model_copy(update={"trained_tasks": []})
    known = Modalities(found.modalities | {"text": text})
    known.prompt_attention = "causal"
    return replace(found, modalities=known, description=description)


def text_of(segments: list[Segment], text: Text) -> str:
    return "".join(text.decode(one.arrays["ids"]) if one.kind == "text" else f"({one.kind})" for one in segments)


def test_the_template_of_an_imported_tokenizer_lays_out_its_chats() -> None:
    asked = imported(trained=False)
    prompt = source_segments(parts_of_messages(messages_before(4), Limits(), asked), asked.modalities)
    shown, opening = split_opening(prompt)
    assert text_of(shown, asked.text) + asked.text.decode([opening or 0]) == (
        "<s>system\nBe brief.</s>\n<s>user\n(image_in) What is it?</s>\n<s>assistant\na cup</s>\n"
        "<s>user\nDraw it, say it, weigh it.</s>\n<s>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "does not take these messages"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("{{ '{}'.format() }}", "does not take these messages"),
        ("{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}", "rewrites earlier turns"),
    ],
)
def test_a_template_that_cannot_be_used_gets_a_sentence(template: str, said: str) -> None:
    example = TASKS["chat"].example(RECORD, np.random.default_rng(0), train=True)
    with pytest.raises(ConfigError, match=said):
        source_segments(example.source, imported(template).modalities, np.random.default_rng(0))


INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}.{% else %}[{{ m.content }}]{% endif %}"
    "{% endfor %}"
)


def test_a_template_is_rendered_as_by_transformers() -> None:
    values = "{% if tools is not none or documents is not none %}tools{% endif %}{{ {'b': '<é>', 'a': 1} | tojson }}"
    (segment, *_) = source_segments(chat_parts([("user", [Part("text", "x")])]), imported(values).modalities)
    assert text_of([segment], imported().text).startswith('{"b": "<é>", "a": 1')


def test_an_empty_turn_reaches_a_template_and_nothing_but_empty_ones_does_not() -> None:
    turns = [("system", ""), ("user", "a"), ("assistant", " "), ("user", "b")]
    messages = [Message(role=role, content=said) for role, said in turns]  # type: ignore[arg-type]
    asked = imported(trained=False)
    segments = source_segments(parts_of_messages(messages, Limits(), asked), asked.modalities)
    assert text_of(segments, asked.text).startswith(
        "<s>system\n</s>\n<s>user\na</s>\n<s>assistant\n</s>\n<s>user\nb</s>\n"
    )
    assert not parts_of_messages(messages[::2], Limits(), asked)
    assert [part.raw for part in parts_of_messages(messages, Limits(), model())] == ["a", "b"]


def test_texts_of_a_message_are_lines_for_a_template() -> None:
    content = [{"type": "text", "text": text} for text in ("Sort this list:", "pears")]
    messages, asked = [Message(role="user", content=content)], imported(trained=False)  # type: ignore[arg-type]
    assert parts_of_messages(messages, Limits(), asked)[0].raw == "Sort this list:\npears"
    # One that was trained on chats reads them as in training.
    assert parts_of_messages(messages, Limits(), imported())[0].raw == "Sort this list:pears"


def test_a_template_that_opens_no_answer_is_answered_from_its_last_token() -> None:
    asked = imported(INST)
    prompt = source_segments(chat_parts([("user", [Part("text", "a cup")])]), asked.modalities)
    shown, opening = split_opening(prompt)
    assert text_of(shown, asked.text) == "[a cup" and opening == asked.text.encode("]")[0]
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    record = {
        "id": "1",
        "messages": [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns],
    }
    example = TASKS["chat"].example(record, np.random.default_rng(0), train=True)
    segments = source_segments(example.source, asked.modalities, np.random.default_rng(0))
    shared = [one for one in segments if one.placement != "aside"]
    (learned,) = (one for one in segments if one.placement == "aside")
    assert text_of(shared, asked.text) == "[one]two.[three]"
    assert learned.arrays["ids"].tolist() == asked.text.encode("]") + asked.text.encode("two")
    before = segments[: [one is learned for one in segments].index(True)]
    assert text_of(before, asked.text) == "[one" and learned.span == 0


def test_an_opening_is_written_as_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece puts a space before a text that stands alone."""
    asked = imported("{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}go{% endif %}")
    alone, encode = asked.text.encode(" "), Text.encode
    monkeypatch.setattr(Text, "encode", lambda self, text: [*alone, *encode(self, text)])
    _, opening = asked.text.chat([Part("text", "a", {"role": "user"})])
    assert list(opening) == encode(asked.text, "go")


def test_a_chat_that_ends_otherwise_without_an_answer_is_read_once() -> None:
    ends = "{% if add_generation_prompt %}go{% else %}end{% endif %}"
    asked = imported("{% for m in messages %}{{ m.content }};{% endfor %}" + ends)
    parts, opening = asked.text.chat([Part("text", "a", {"role": "user"})])
    assert [part.raw for part in parts] == ["a;go"] and not opening


def test_marks_of_what_is_trained_change_nothing_of_a_template() -> None:
    mark, end = "{% generation %}", "{%- endgeneration %}"
    marked = TEMPLATE.replace("{{ m.content }}", f"{mark}{{% set said = m.content %}}{end}{mark}{{{{ said }}}}{end}")
    prompts = []
    for template in (TEMPLATE, marked):
        asked = imported(template, trained=False)
        segments = source_segments(parts_of_messages(messages_before(4), Limits(), asked), asked.modalities)
        prompts.append(text_of(segments, asked.text))
    assert prompts[0] == prompts[1]


def test_a_template_may_leave_nothing_of_a_chat() -> None:
    asked = imported("{# nothing #}", trained=False)
    assert source_segments(chat_parts([("user", [Part("text", "x")])]), asked.modalities) == []


def test_no_text_passes_for_an_image_or_ends_its_turn() -> None:
    asked, letters = imported(trained=False), "".join(map(chr, range(0xFDD0, 0xFDF0)))
    segments = source_segments(chat_parts([("user", [Part("text", f"a<e>{letters}<e>b")])]), asked.modalities)
    assert text_of(segments, asked.text) == "<s>system\nHelp.</s>\n<s>user\na  b</s>\n"


def test_a_model_of_single_questions_reads_them_alone() -> None:
    image, question, answer = Part("image", b"x"), Part("text", "What is this?"), Part("text", "a cup")
    begun = [("system", [Part("text", "Be kind.")]), ("user", [image, question])]
    assert _as_single_questions(begun) == begun
    told = [*begun, ("assistant", [answer])]
    again = ("user", [image, question])
    assert _as_single_questions([*told, again]) == [begun[0], again]
    later = ("user", [Part("text", "What is it for?")])
    assert _as_single_questions([*told, later]) == [begun[0], ("user", [question]), told[2], later]
